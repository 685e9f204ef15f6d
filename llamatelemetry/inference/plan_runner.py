"""Runs a scheduler's plan through the model: who decodes by the recorded step, prompts eagerly."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.inference.ahead import tokens_of
from llamatelemetry.inference.chunk_steps import ROWS, TOKENS, ChunkSteps
from llamatelemetry.inference.decode_rows import (
    added_blocks,
    buckets_of,
    chunk_of,
    drawn_counts,
    is_ahead,
    placed,
)
from llamatelemetry.inference.drawing import (
    Asked,
    Drawn,
    draw,
    draw_for_pieces,
    draw_on_device,
    of_piece,
)
from llamatelemetry.inference.launched import Launched, Result, take_ahead
from llamatelemetry.inference.logits_step import LogitsStep
from llamatelemetry.inference.piece_kinds import KINDS, kinds_of
from llamatelemetry.inference.plan import Piece, Plan
from llamatelemetry.inference.preemption_costs import PreemptionCosts
from llamatelemetry.inference.runner import DecodeStep, StepRunner
from llamatelemetry.inference.sampling import GREEDY, nan_error, sampling_tensors
from llamatelemetry.inference.scheduled_request import ScheduledRequest
from llamatelemetry.inference.step import current, no_autocast, put
from llamatelemetry.inference.verify import MAX_VERIFY_STEPS, Verifier

MIN_WIDTH = 8  # blocks in a table; wider ones come in powers of two


class PlanRunner:
    """Steps of one model over the blocks of one scheduler. Not thread-safe.

    Args:
        model: a patched transformers model.
        asked_of: how a request's tokens are to be drawn.
        max_rows: requests that decode in one step at most.
        page_size: tokens in a block.
        cache_dtype: as in StepRunner.
        longest: drafted tokens that a piece has at most.
        split_size: of attention; other than 0 decode steps have max_rows rows, however few decode,
            and each prompt a forward of its own, so that no bit of a request's tokens depends on
            the others.

    Attributes:
        runner: StepRunner, with the cache.
        verifier: Verifier of its rows.
        chunk_steps: ChunkSteps, the packed forwards that are captured.
        packs: whether prompts and those that decode run in one forward, which reads the weights
            once; else the latter by the recorded step, which on the CPU costs less.
        costs: PreemptionCosts, told what forwards over prompts take.
        decode_mode: how the last decode step was run: "recorded" (CPU), "graph" (CUDA), "eager".
    """

    def __init__(
        self,
        model: Any,
        asked_of: Callable[[ScheduledRequest], Asked],
        max_rows: int,
        page_size: int,
        cache_dtype: torch.dtype | None = None,
        split_size: int = 0,
        longest: int = 0,
    ) -> None:
        buckets = buckets_of(model.device.type, max_rows)
        self.buckets = buckets[-1:] if split_size else buckets
        self._are_apart = split_size > 0
        self.packs = model.device.type == "cuda" and not self._are_apart
        # Of each size one that draws, and one whose logits the host looks at.
        count = 2 * len(self.buckets) + MAX_VERIFY_STEPS * (longest > 0)
        sizes = page_size, count + len(ROWS) * len(TOKENS) * self.packs
        self.runner = StepRunner(model, *sizes, cache_dtype, split_size)
        self.chunk_steps = ChunkSteps(self.runner, asked_of, is_on=self.packs)
        self.verifier = Verifier(self.runner, asked_of, self._is_watched, self.buckets, longest)
        self.decode_mode, self.costs = "eager", PreemptionCosts()
        self.width = MIN_WIDTH
        self._asked_of = asked_of
        self._loaded: list[Piece] = []  # that the decode step ran last
        self._watched: list[Piece] = []

    def can_launch(self, plan: Plan) -> bool:
        """Whether the host need not look at anything before the tokens of a plan are drawn."""
        return not any(
            piece.draft or (piece.draws and (piece.request.siblings or self._is_watched(piece)))
            for piece in plan.pieces
        )

    @torch.inference_mode()
    def launch(self, plan: Plan, before: Launched | None) -> Launched:
        """Runs a plan's forwards, as run does, but waits for nothing.

        Args:
            plan: of pieces that can_launch allows.
            before: the plan before it, where the host has not seen its results.

        Raises:
            Exception: of a forward; no result counts. The results of before are good.
        """
        device, kinds = self.runner.pages.device, kinds_of(plan, self._is_watched, self._are_apart)
        launched = Launched(device, self.runner.pages.model_dtype, self.costs)
        with current(device), torch.autocast(device.type, enabled=False):
            try:
                packed = self._packed(kinds)
                if not packed and (pieces := kinds.get("decoding", [])):
                    launched.add(pieces, self._run_step(pieces, before).drawn())
                drawn = self.chunk_steps.drawn(kinds, self.width, before) if packed else None
                for pieces in [packed] if packed else self._prompts(kinds):
                    launched.add(
                        pieces, self._drawn_eagerly(pieces, before) if drawn is None else drawn
                    )
            except BaseException:
                self._loaded = []
                raise
            launched.seal()
        return launched

    @torch.inference_mode()
    def run(self, plan: Plan) -> Iterator[Result]:
        """Each piece with the tokens drawn after it, or what its forward raised.

        A forward of several that raises is run again one by one, so that an error is of the request
        alone that causes it.
        """
        kinds = kinds_of(plan, self._is_watched, self._are_apart)
        if pieces := self._packed(kinds):
            return (yield from self._isolated(pieces, self._eager))
        # Apart, for each kind runs through kernels of its own: no token depends on which others
        # there are in a step, but that one draft sends all that decode through a VerifyStep's.
        yield from self._isolated(kinds.get("decoding", []), self._decode)
        yield from self._isolated(kinds.get("watched", []), self._decode_watched)
        pieces, prompts = kinds.get("verified", []), list(self._prompts(kinds))
        is_one = self.packs and bool(pieces)
        yield from self._verified(pieces, list(chain(*prompts)) if is_one else [])
        for pieces in [] if is_one else prompts:
            yield from self._isolated(pieces, self._eager)

    def _packed(self, kinds: dict[str, list[Piece]]) -> list[Piece]:
        """All pieces in the order of their kinds, if one forward is to run on them; else none."""
        has_prompts = "continued" in kinds or "whole" in kinds
        if not (self.packs and has_prompts and len(kinds) > 1) or "verified" in kinds:
            return []
        return [piece for kind in KINDS for piece in kinds.get(kind, [])]

    def _prompts(self, kinds: dict[str, list[Piece]]) -> Iterator[list[Piece]]:
        """Pieces of prompts, those of one forward at a time."""
        for kind in KINDS[2:]:
            pieces = kinds.get(kind, [])
            if self._are_apart:
                yield from ([piece] for piece in pieces)
            elif pieces:
                yield pieces

    def _is_watched(self, piece: Piece) -> bool:
        request = piece.request
        return (request.min_tokens > 0 and bool(request.forbidden)) or (
            self._asked_of(request).needs_logits
        )

    def _isolated(
        self, pieces: list[Piece], forward: Callable[[list[Piece]], list[list[Drawn] | Exception]]
    ) -> list[Result]:
        if not pieces:
            return []
        try:
            with no_autocast(self.runner.pages.device):  # in the cache's dtype
                return list(zip(pieces, forward(pieces), strict=True))
        except Exception as error:
            self.runner.drop_steps()
            if len(pieces) == 1 and forward == self._eager:
                return [(pieces[0], error)]
        return [result for piece in pieces for result in self._isolated([piece], self._eager)]

    def _verified(self, pieces: list[Piece], prompts: Sequence[Piece] = ()) -> Iterator[Result]:
        """Pieces of which some have drafts, and what each draws, token by token; and prompts in the
        same forward. Where that fails, those that have drawn nothing are run again one by one,
        without their drafts."""
        given: set[ScheduledRequest] = set()
        try:
            if prompts:
                pieces = sorted(pieces, key=lambda piece: bool(piece.draft))  # each kind a part
                drawn, logits, last = self.verifier.run_beside(pieces, prompts, self.width)
                beside = draw_for_pieces(last, prompts, self._asked_of)
            elif pieces:
                step, beside = self.verifier.run(pieces, self.width), []
                self.decode_mode, drawn, logits = step.mode, step.drawn(), step.logits
            else:
                return
            for piece, result in self.verifier.results(pieces, drawn, logits):
                given.add(piece.request)
                yield piece, result
            for piece, result in zip(prompts, beside, strict=True):
                given.add(piece.request)
                yield piece, result
        except Exception:
            self.runner.drop_steps()
            self.verifier.was_typical = False
            for piece in (*pieces, *prompts):
                if piece.request not in given and piece.request.finish_reason is None:
                    yield from self._isolated([piece], self._eager)

    def _prefill(self, pieces: list[Piece], before: Launched | None = None) -> Tensor:
        """Logits of the last token of each piece."""
        chunks, ahead = [chunk_of(piece) for piece in pieces], {}
        if are_ahead := [i for i, piece in enumerate(pieces) if is_ahead(piece)]:
            assert before is not None  # it draws their tokens
            places, ends = before.places, list(accumulate(len(chunk.tokens) for chunk in chunks))
            ahead = {ends[i] - 1: places[pieces[i].request] for i in are_ahead}
        more: Any = {"ahead": ahead, "in_parts": True} if self.packs else {}
        return self.runner.prefill(chunks, self.width, **more)

    def _drawn_eagerly(self, pieces: list[Piece], before: Launched | None = None) -> Tensor | None:
        """A forward of pieces that the host does not look at: a token for each that draws, -1 where
        its logits are NaN."""
        return draw_on_device(self._prefill(pieces, before), pieces, self._asked_of)

    def _eager(self, pieces: list[Piece]) -> list[list[Drawn] | Exception]:
        """A forward of any pieces."""
        begin = time.perf_counter()
        drawn = draw_for_pieces(self._prefill(pieces), pieces, self._asked_of)
        if any(drawn) or self.runner.pages.device.type == "cpu":  # else a GPU may be at work yet
            self.costs.note_forward(pieces, time.perf_counter() - begin)
        return drawn

    def _decode(self, pieces: list[Piece]) -> list[list[Drawn] | Exception]:
        tokens = tokens_of(self._run_step(pieces, None))[: len(pieces)]
        if min(tokens) < 0:
            raise nan_error(self.runner.pages.model_dtype)
        return [[Drawn(token)] for token in tokens]

    def _run_step(self, pieces: list[Piece], before: Launched | None) -> DecodeStep:
        """Runs the recorded step; its rows stay loaded as long as no other comes or goes."""
        step, _ = self.runner.draw(
            lambda: self._step_with(pieces, before), looks_first=before is not None
        )
        self.decode_mode = step.mode
        # The step itself has moved its rows on to the next token.
        step.owner = self._loaded = pieces
        return step

    def _decode_watched(self, pieces: list[Piece]) -> list[list[Drawn] | Exception]:
        """A recorded step that ends in logits, for requests whose draws are the host's."""
        step = self._watched_step(pieces)
        if step.is_stale:
            self.runner.drop_steps()
            step = self._watched_step(pieces)
        spare = len(step.input_ids) - len(pieces)
        ids = [piece.request.tokens[-1] for piece in pieces] + [0] * spare
        logits = step.step(put(ids, torch.int64, step.input_ids.device))[: len(pieces)]
        requests = [piece.request for piece in pieces]
        drawn = draw(logits, requests, list(map(self._asked_of, requests)))
        self.decode_mode = step.mode
        step.owner = self._watched = pieces
        return [of_piece([one]) for one in drawn]

    def _watched_step(self, pieces: list[Piece]) -> LogitsStep:
        step = self.runner.step_of(LogitsStep, self._rows_for(pieces), self.width)
        if (
            step.owner is not self._watched
            or (added := added_blocks(self._watched, pieces)) is None
        ):
            chunks, active = placed(pieces, len(step.input_ids))
            step.load(None, chunks, step.sampling, [0] * len(active), active)
        elif added:
            step.add_blocks(added)
        step.owner = None
        return step

    def _rows_for(self, pieces: list[Piece]) -> int:
        return next(size for size in self.buckets if size >= len(pieces))

    def _step_with(self, pieces: list[Piece], before: Launched | None) -> DecodeStep:
        """The decode step for these pieces, with its rows in place."""
        step = self.runner.decode_step(self._rows_for(pieces), self.width)
        if step.owner is not self._loaded or (added := added_blocks(self._loaded, pieces)) is None:
            chunks, active = placed(pieces, len(step.input_ids))
            spare = len(active) - len(pieces)
            params = [self._asked_of(piece.request).params for piece in pieces]
            counts = drawn_counts([piece.request for piece in pieces])
            sampling = sampling_tensors(params + [GREEDY] * spare, self.runner.pages.device)
            step.load(None, chunks, sampling, counts + [0] * spare, active)
            take_ahead(step.input_ids, pieces, before)
        elif added:
            step.add_blocks(added)
        step.owner = None  # until the run is over: an interrupted one leaves rows in between
        return step
