"""Drafts of a smaller model, for all rows of a plan at once, from a paged cache of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from llamatelemetry.inference.decode_rows import buckets_of
from llamatelemetry.inference.decode_step import DecodeStep
from llamatelemetry.inference.drawing import Asked
from llamatelemetry.inference.plan import Piece, Plan
from llamatelemetry.inference.runner import StepRunner
from llamatelemetry.inference.sampling import GREEDY, SamplingParams, sampling_tensors
from llamatelemetry.inference.scheduled_request import ScheduledRequest
from llamatelemetry.inference.speculation_config import SpeculationConfig
from llamatelemetry.inference.step import Chunk, current, put, take_ids
from llamatelemetry.loading.find import context_length_of

_log = logging.getLogger("llamatelemetry")

_PREFILL_TOKENS = 4096  # of one forward at most


@dataclass
class _Known:
    """What of a request is in the draft model's cache."""

    preemptions: int
    table: list[int]
    length: int  # tokens of the request
    fed: tuple[int, ...]  # drafted ones after them


class ModelDrafts:
    """Drafts by a model of the target's vocabulary.

    Its pages have the numbers of the target's blocks: a request's keys stand where its table says,
    in both caches. What the draft model has computed of a request is looked up before each draft,
    and the rest computed first; what is wrong there costs right drafts alone.

    A drafted token is drawn with the random bits with which the target draws there, so that equal
    distributions draw equal tokens.

    Args:
        model: a patched transformers model, on the target's device.
        asked_of: how a request's tokens are to be drawn.
        max_rows: requests that decode in one step at most.
        page_size: tokens in a block.
    """

    def __init__(
        self,
        model: Any,
        asked_of: Callable[[ScheduledRequest], Asked],
        max_rows: int,
        page_size: int,
    ) -> None:
        self._asked_of = asked_of
        self._buckets = buckets_of(model.device.type, max_rows)
        self._page_size = page_size
        self._runner = StepRunner(model, page_size, len(self._buckets))
        self._known: WeakKeyDictionary[ScheduledRequest, _Known] = WeakKeyDictionary()
        self.max_context = context_length_of(model.config)

    def grow(self, num_blocks: int) -> None:
        """Makes room for so many blocks before there is a request."""
        self._runner.pages.grow(num_blocks, keep=False)

    def ready(self, num_positions: int, num_blocks: int) -> None:
        """Grows tables and cache as StepRunner.ready does."""
        model = self._runner.model
        if not self._runner.serves(model):
            self._runner = StepRunner(model, self._page_size, len(self._buckets))
            self._known.clear()
        positions = min(num_positions, self.max_context)
        if not self._runner.ready(positions, num_blocks, keep=True):
            self._known.clear()

    @torch.inference_mode()
    def fill(self, plan: Plan, width: int) -> None:
        """Puts drafted tokens in the place of those that a plan has room for.

        Args:
            plan: whose blocks are copied; drafts in it say how many tokens are wanted.
            width: blocks of the widest table.
        """
        pieces = [piece for piece in plan.pieces if piece.draft]
        if not pieces:
            return
        device = self._runner.pages.device
        try:
            with current(device), torch.autocast(device.type, enabled=False):
                drawn = self._drawn(pieces, width)
        except Exception as error:  # requests go on without drafts
            _log.warning("speculation: this step has no drafts, the draft model raised: %s", error)
            self._runner.drop_steps()
            self._known.clear()
            drawn = [[] for _ in pieces]
        for piece, tokens in zip(pieces, drawn, strict=True):
            request, count = piece.request, len(piece.draft)
            draft = tuple(takewhile(lambda token: token >= 0, tokens[:count]))
            filled = Piece(request, piece.begin, piece.end, piece.table, piece.draws, draft)
            plan.pieces[plan.pieces.index(piece)] = filled
            if draft:
                known = _Known(request.preemptions, piece.table, piece.end, draft[:-1])
                self._known[request] = known

    def _drawn(self, pieces: Sequence[Piece], width: int) -> list[list[int]]:
        """Tokens after each piece, as many as the longest draft has; -1 for NaN."""
        params = [self._asked_of(piece.request).params for piece in pieces]
        offsets = [piece.request.num_drawn for piece in pieces]
        logits = self._prefill(pieces, width)
        device = logits.device
        sampling = sampling_tensors(params, device)
        first = sampling.sample(logits, put(offsets, torch.int64, device))
        first = first.masked_fill(logits.isnan().any(-1), -1)
        found = [first]
        counts = [len(piece.draft) for piece in pieces]
        if max(counts) > 1:
            found += self._decode(pieces, width, params, offsets, first)
        columns = torch.stack(found).tolist()
        return [[column[row] for column in columns] for row in range(len(pieces))]

    def _prefill(self, pieces: Sequence[Piece], width: int) -> Tensor:
        """Logits [len(pieces), vocab_size] after each piece, whatever of it is known."""
        rows: list[Tensor] = []
        batch: list[Chunk] = []
        for piece in pieces:
            begin, tokens = self._num_known(piece), piece.request.tokens[: piece.end]
            while piece.end - begin > _PREFILL_TOKENS:
                end = begin + _PREFILL_TOKENS
                self._runner.prefill([Chunk(tokens[begin:end], begin, piece.table)], width)
                begin = end
            chunk = Chunk(tokens[begin:], begin, piece.table)
            if sum(len(one.tokens) for one in (*batch, chunk)) > _PREFILL_TOKENS:
                rows.append(self._runner.prefill(batch, width))
                batch = []
            batch.append(chunk)
        rows.append(self._runner.prefill(batch, width))
        return torch.cat(rows)

    def _num_known(self, piece: Piece) -> int:
        """Leading tokens whose keys are in the cache; at least one of a piece is computed."""
        known, request = self._known.get(piece.request), piece.request
        if known is None or known.preemptions != request.preemptions:
            return 0
        length = known.length
        for token in known.fed:
            if length >= piece.end or request.tokens[length] != token:
                break
            length += 1
        same = next(
            (i for i, (a, b) in enumerate(zip(known.table, piece.table, strict=False)) if a != b),
            min(len(known.table), len(piece.table)),
        )
        return min(length, same * self._page_size, piece.end - 1)

    def _decode(
        self,
        pieces: Sequence[Piece],
        width: int,
        params: Sequence[SamplingParams],
        offsets: Sequence[int],
        first: Tensor,
    ) -> list[Tensor]:
        """Tokens after the first drafted one, a tensor [len(pieces)] for each place."""
        rows = next(size for size in self._buckets if size >= len(pieces))
        spare = rows - len(pieces)
        chunks = [Chunk([0], piece.end, piece.table) for piece in pieces]
        chunks += [Chunk([0], 0, pieces[0].table[:1])] * spare
        sampling = sampling_tensors([*params, *[GREEDY] * spare], first.device)
        counts = [len(piece.draft) for piece in pieces] + [0] * spare

        def load() -> DecodeStep:
            step = self._runner.decode_step(rows, width)
            later = [offset + 1 for offset in offsets] + [0] * spare
            step.load(None, chunks, sampling, later, [count > 1 for count in counts])
            where = range(len(pieces))
            take_ids(step.input_ids, where, [(first, i) for i in where])
            return step

        step, _ = self._runner.draw(load)
        found = [step.drawn()[: len(pieces)].clone()]
        for place in range(2, max(counts)):
            step.hold([count > place for count in counts])
            step.run()
            found.append(step.drawn()[: len(pieces)].clone())
        return found


def drafts_of(
    config: SpeculationConfig | None,
    asked_of: Callable[[ScheduledRequest], Asked],
    max_rows: int,
    page_size: int,
) -> ModelDrafts | None:
    """ModelDrafts of a config's draft model; None where it has none."""
    if config is None or config.draft_model is None:
        return None
    return ModelDrafts(config.draft_model, asked_of, max_rows, page_size)
