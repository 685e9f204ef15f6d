"""Runs a scheduler's plan through the model: who decodes by the recorded step, prompts eagerly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llamatelemetry.inference.drawing import Asked, Drawn, draw
from llamatelemetry.inference.logits_step import LogitsStep
from llamatelemetry.inference.runner import DecodeStep, StepRunner
from llamatelemetry.inference.sampling import GREEDY, refuse_nan, sampling_tensors
from llamatelemetry.inference.scheduled_request import ScheduledRequest
from llamatelemetry.inference.scheduler import Piece, Plan
from llamatelemetry.inference.step import Chunk

# Rows of the recorded or captured decode steps. Rows too many cost time on the CPU, where a
# recording costs little; a graph costs a capture, and a few rows more next to nothing.
BUCKETS = {"cpu": (*range(1, 9),), "cuda": (1, 2, 4, 8)}
MIN_WIDTH = 8  # blocks in a table; wider ones come in powers of two

# One token for each of piece.request.draws_for; none where the piece draws nothing.
Result = tuple[Piece, "list[Drawn] | Exception"]


@dataclass(frozen=True)
class _Loaded:
    """A row of the decode step, as it stands now."""

    request: ScheduledRequest
    length: int
    table: list[int]


class PlanRunner:
    """Steps of one model over the blocks of one scheduler. Not thread-safe.

    Args:
        model: a patched transformers model.
        asked_of: how a request's tokens are to be drawn.
        max_rows: requests that decode in one step at most.
        page_size: tokens in a block.

    Attributes:
        runner: StepRunner, with the cache.
        decode_mode: how the last decode step was run: "recorded" (CPU), "graph" (CUDA), "eager".
    """

    def __init__(
        self,
        model: Any,
        asked_of: Callable[[ScheduledRequest], Asked],
        max_rows: int,
        page_size: int,
    ) -> None:
        self.buckets = _buckets(model.device.type, max_rows)
        # Of each size one that draws, and one whose logits the host looks at.
        self.runner = StepRunner(model, page_size, max_steps=2 * len(self.buckets))
        self.decode_mode = "eager"
        self.width = MIN_WIDTH
        self._asked_of = asked_of
        self._loaded: list[_Loaded] = []
        self._watched: list[_Loaded] = []

    @torch.inference_mode()
    def run(self, plan: Plan) -> Iterator[Result]:
        """Each piece with the tokens drawn after it, or what its forward raised.

        A forward of several that raises is run again one by one, so that an error is of the request
        alone that causes it.
        """
        self.runner.pages.copy_blocks(plan.copies)
        kinds: dict[str, list[Piece]] = {}
        for piece in plan.pieces:
            kinds.setdefault(self._kind(piece), []).append(piece)
        # Apart, for each kind runs through kernels of its own: no token depends on which others
        # there are in a step.
        yield from self._isolated(kinds.get("decoding", []), self._decode)
        yield from self._isolated(kinds.get("watched", []), self._decode_watched)
        for kind in ("continued", "whole"):
            yield from self._isolated(kinds.get(kind, []), self._eager)

    def width_for(self, num_blocks: int) -> int:
        """Columns of the block tables once a sequence may have so many blocks."""
        return max(self.width, 1 << max(num_blocks - 1, 0).bit_length())

    def _kind(self, piece: Piece) -> str:
        """What forward a piece has part in: the logits of those that are watched are looked at."""
        if piece.begin == 0:
            return "whole"
        if not piece.draws or piece.end - piece.begin > 1:
            return "continued"
        is_watched = piece.request.forbidden or self._asked_of(piece.request).needs_logits
        return "watched" if is_watched else "decoding"

    def _isolated(
        self, pieces: list[Piece], forward: Callable[[list[Piece]], list[list[Drawn]]]
    ) -> list[Result]:
        if not pieces:
            return []
        try:
            with torch.autocast(self.runner.pages.device.type, enabled=False):  # the cache's dtype
                return list(zip(pieces, forward(pieces), strict=True))
        except Exception as error:
            self.runner.drop_steps()
            if len(pieces) == 1 and forward == self._eager:
                return [(pieces[0], error)]
        return [result for piece in pieces for result in self._isolated([piece], self._eager)]

    def _eager(self, pieces: list[Piece]) -> list[list[Drawn]]:
        """A forward of any pieces."""
        chunks = [
            Chunk(piece.request.tokens[piece.begin : piece.end], piece.begin, piece.table)
            for piece in pieces
        ]
        logits = self.runner.prefill(chunks, self.width)
        rows = [
            (i, one)
            for i, piece in enumerate(pieces)
            if piece.draws
            for one in piece.request.draws_for
        ]
        if not rows:
            return [[] for _ in pieces]
        requests = [one for _, one in rows]
        drawn = draw(logits[[i for i, _ in rows]], requests, list(map(self._asked_of, requests)))
        found: list[list[Drawn]] = [[] for _ in pieces]
        for (i, _), one in zip(rows, drawn, strict=True):
            found[i].append(one)
        return found

    def _decode(self, pieces: list[Piece]) -> list[list[Drawn]]:
        """The recorded step; its rows stay loaded as long as no other comes or goes."""
        wanted = _wanted(pieces)
        step, drawn = self.runner.draw(lambda: self._step_with(pieces, wanted))
        tokens = drawn.tolist()[: len(pieces)]
        if 0 in tokens:  # what a row of NaN alone gives
            refuse_nan(step.logits[: len(pieces)])
        self.decode_mode = step.mode
        # The step itself has moved its rows on to the next token.
        self._loaded = _moved_on(wanted)
        step.owner = self._loaded
        return [[Drawn(token)] for token in tokens]

    def _decode_watched(self, pieces: list[Piece]) -> list[list[Drawn]]:
        """A recorded step that ends in logits, for requests whose draws are the host's."""
        wanted = _wanted(pieces)
        step = self._watched_step(pieces, wanted)
        if step.is_stale:
            self.runner.drop_steps()
            step = self._watched_step(pieces, wanted)
        spare = len(step.input_ids) - len(pieces)
        ids = [piece.request.tokens[-1] for piece in pieces] + [0] * spare
        logits = step.step(torch.tensor(ids, device=step.input_ids.device))[: len(pieces)]
        requests = [piece.request for piece in pieces]
        drawn = draw(logits, requests, list(map(self._asked_of, requests)))
        self.decode_mode = step.mode
        self._watched = _moved_on(wanted)
        step.owner = self._watched
        return [[one] for one in drawn]

    def _watched_step(self, pieces: list[Piece], wanted: list[_Loaded]) -> LogitsStep:
        step = self.runner.step_of(LogitsStep, self._rows_for(pieces), self.width)
        if step.owner is not self._watched or wanted != self._watched:
            chunks, active = self._placed(pieces, len(step.input_ids))
            step.load(None, chunks, step.sampling, [0] * len(active), active)
        step.owner = None
        return step

    def _rows_for(self, pieces: list[Piece]) -> int:
        return next(size for size in self.buckets if size >= len(pieces))

    def _placed(self, pieces: list[Piece], rows: int) -> tuple[list[Chunk], list[bool]]:
        """Rows of a decode step, and which of them are active."""
        spare = rows - len(pieces)
        chunks = [Chunk(p.request.tokens[-1:], p.begin, p.table) for p in pieces]
        # A spare row reads a key that there is, whatever it holds, and writes nothing.
        chunks += [Chunk([0], 0, pieces[0].table[:1])] * spare
        return chunks, [True] * len(pieces) + [False] * spare

    def _step_with(self, pieces: list[Piece], wanted: list[_Loaded]) -> DecodeStep:
        """The decode step for these pieces, with its rows in place."""
        step = self.runner.decode_step(self._rows_for(pieces), self.width)
        if step.owner is not self._loaded or wanted != self._loaded:
            chunks, active = self._placed(pieces, len(step.input_ids))
            spare = len(active) - len(pieces)
            params = [self._asked_of(piece.request).params for piece in pieces]
            counts = [piece.request.num_drawn for piece in pieces]
            sampling = sampling_tensors(params + [GREEDY] * spare, self.runner.pages.device)
            step.load(None, chunks, sampling, counts + [0] * spare, active)
        step.owner = None  # until the run is over: an interrupted one leaves rows in between
        return step


def _wanted(pieces: list[Piece]) -> list[_Loaded]:
    """The rows of a decode step for these pieces."""
    return [_Loaded(p.request, len(p.request.tokens), p.table) for p in pieces]


def _moved_on(rows: list[_Loaded]) -> list[_Loaded]:
    """Where rows stand after a step."""
    return [_Loaded(row.request, row.length + 1, row.table) for row in rows]


def _buckets(device: str, max_rows: int) -> Sequence[int]:
    """Numbers of rows of which there are decode steps, the last at least max_rows."""
    small = BUCKETS.get(device, BUCKETS["cuda"])
    sizes = [*small, *range(16, max_rows + 8, 8)]
    last = next(i for i, size in enumerate(sizes) if size >= max_rows)
    return sizes[: last + 1]
