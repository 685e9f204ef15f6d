"""Runs a scheduler's plan through the model: who decodes by the recorded step, prompts eagerly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llamatelemetry.inference.runner import DecodeStep, StepRunner
from llamatelemetry.inference.sampling import (
    GREEDY,
    SamplingParams,
    mark_seen_,
    penalises,
    refuse_nan,
    sampling_tensors,
)
from llamatelemetry.inference.scheduled_request import ScheduledRequest
from llamatelemetry.inference.scheduler import Piece, Plan
from llamatelemetry.inference.step import Chunk

# Rows of the recorded or captured decode steps. Rows too many cost time on the CPU, where a
# recording costs little; a graph costs a capture, and a few rows more next to nothing.
BUCKETS = {"cpu": (*range(1, 9),), "cuda": (1, 2, 4, 8)}
MIN_WIDTH = 8  # blocks in a table; wider ones come in powers of two

Result = tuple[Piece, "int | Exception | None"]


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
        params_of: a request's SamplingParams.
        max_rows: requests that decode in one step at most.
        page_size: tokens in a block.

    Attributes:
        runner: StepRunner, with the cache.
        decode_mode: how the last decode step was run: "recorded" (CPU), "graph" (CUDA), "eager".
    """

    def __init__(
        self,
        model: Any,
        params_of: Callable[[ScheduledRequest], SamplingParams],
        max_rows: int,
        page_size: int,
    ) -> None:
        self.buckets = _buckets(model.device.type, max_rows)
        self.runner = StepRunner(model, page_size, max_steps=len(self.buckets))
        self.decode_mode = "eager"
        self.width = MIN_WIDTH
        self._params_of = params_of
        self._loaded: list[_Loaded] = []

    @torch.inference_mode()
    def run(self, plan: Plan) -> Iterator[Result]:
        """Each piece with the token drawn after it, None where none is, or what its forward raised.

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
        for kind in ("masked", "continued", "whole"):
            yield from self._isolated(kinds.get(kind, []), self._eager)

    def width_for(self, num_blocks: int) -> int:
        """Columns of the block tables once a sequence may have so many blocks."""
        return max(self.width, 1 << max(num_blocks - 1, 0).bit_length())

    def _kind(self, piece: Piece) -> str:
        """What forward a piece has part in: those that are masked need logits to look at."""
        if piece.begin == 0:
            return "whole"
        if not piece.draws or piece.end - piece.begin > 1:
            return "continued"
        is_masked = piece.request.forbidden or penalises([self._params_of(piece.request)])
        return "masked" if is_masked else "decoding"

    def _isolated(
        self, pieces: list[Piece], forward: Callable[[list[Piece]], list[int | None]]
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

    def _eager(self, pieces: list[Piece]) -> list[int | None]:
        """A forward whose logits can be looked at."""
        chunks = [
            Chunk(piece.request.tokens[piece.begin : piece.end], piece.begin, piece.table)
            for piece in pieces
        ]
        logits = self.runner.prefill(chunks, self.width)
        drawing = [i for i, piece in enumerate(pieces) if piece.draws]
        if not drawing:
            return [None] * len(pieces)
        logits = logits[drawing]
        requests = [pieces[i].request for i in drawing]
        for row, request in zip(logits, requests, strict=True):
            if request.forbidden:
                row[list(request.forbidden)] = -torch.inf
        refuse_nan(logits)
        params, seen = [self._params_of(one) for one in requests], None
        if penalises(params):
            seen = logits.new_empty(logits.shape, dtype=torch.bool)
            mark_seen_(seen, [one.tokens for one in requests])
        offsets = torch.tensor([one.num_drawn for one in requests], device=logits.device)
        sampling = sampling_tensors(params, logits.device)
        tokens = iter(sampling.sample(logits, offsets, seen).tolist())
        return [next(tokens) if piece.draws else None for piece in pieces]

    def _decode(self, pieces: list[Piece]) -> list[int | None]:
        """The recorded step; its rows stay loaded as long as no other comes or goes."""
        wanted = [_Loaded(p.request, len(p.request.tokens), p.table) for p in pieces]
        step, drawn = self.runner.draw(lambda: self._step_with(pieces, wanted))
        tokens = drawn.tolist()[: len(pieces)]
        if 0 in tokens:  # what a row of NaN alone gives
            refuse_nan(step.logits[: len(pieces)])
        self.decode_mode = step.mode
        # The step itself has moved its rows on to the next token.
        self._loaded = [_Loaded(p.request, p.length + 1, p.table) for p in wanted]
        step.owner = self._loaded
        return tokens

    def _step_with(self, pieces: list[Piece], wanted: list[_Loaded]) -> DecodeStep:
        """The decode step for these pieces, with its rows in place."""
        rows = next(size for size in self.buckets if size >= len(pieces))
        step = self.runner.decode_step(rows, self.width)
        if step.owner is not self._loaded or wanted != self._loaded:
            chunks = [Chunk(p.request.tokens[-1:], p.begin, p.table) for p in pieces]
            params = [self._params_of(piece.request) for piece in pieces]
            counts = [piece.request.num_drawn for piece in pieces]
            spare = rows - len(pieces)
            # A spare row reads a key that there is, whatever it holds, and writes nothing.
            chunks += [Chunk([0], 0, pieces[0].table[:1])] * spare
            sampling = sampling_tensors(params + [GREEDY] * spare, self.runner.pages.device)
            active = [True] * len(pieces) + [False] * spare
            step.load(None, chunks, sampling, counts + [0] * spare, active)
        step.owner = None  # until the run is over: an interrupted one leaves rows in between
        return step


def _buckets(device: str, max_rows: int) -> Sequence[int]:
    """Numbers of rows of which there are decode steps, the last at least max_rows."""
    small = BUCKETS.get(device, BUCKETS["cuda"])
    sizes = [*small, *range(16, max_rows + 8, 8)]
    last = next(i for i, size in enumerate(sizes) if size >= max_rows)
    return sizes[: last + 1]
