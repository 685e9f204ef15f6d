"""Which packed forwards of a batch are captured: those of as many rows and tokens as come often."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from llamatelemetry.inference.chunk_step import MAX_PROMPTS, ChunkStep
from llamatelemetry.inference.decode_rows import chunk_of, drawn_counts
from llamatelemetry.inference.decode_step import has_experts
from llamatelemetry.inference.drawing import Asked
from llamatelemetry.inference.launched import Launched, take_ahead
from llamatelemetry.inference.plan import Piece
from llamatelemetry.inference.runner import StepRunner
from llamatelemetry.inference.scheduled_request import ScheduledRequest
from llamatelemetry.inference.step import put

_log = logging.getLogger("llamatelemetry")

ROWS = (8, 16, 32, 64, 128, 256)
TOKENS = (64, 128, 256, 512)  # of prompts; a forward of more is the GPU's work, not the host's
# On an H200 a capture took about 40 ms more than its forward, and each replay some 3 less.
WORTH = 12


class ChunkSteps:
    """The packed forwards of one runner that the host launches as one.

    Args:
        runner: whose cache the rows and prompts are in.
        asked_of: how a request's tokens are to be drawn.
        is_on: whether any are captured.

    Attributes:
        is_on: not any more once one has failed, or the model turned out to run eagerly.
    """

    def __init__(
        self, runner: StepRunner, asked_of: Callable[[ScheduledRequest], Asked], *, is_on: bool
    ) -> None:
        self._runner, self._asked_of = runner, asked_of
        self.is_on = is_on and not has_experts(runner.model)  # which could not choose them anew
        self._wanted: Counter[tuple[int, int]] = Counter()

    def drawn(
        self, kinds: Mapping[str, list[Piece]], width: int, before: Launched | None
    ) -> Tensor | None:
        """Runs a plan's pieces, in the order of their kinds.

        Args:
            kinds: the pieces by kind, none of which the host looks at.
            width: of the block tables.
            before: the plan before, where the host has not seen its results.

        Returns:
            As draw_on_device: the tokens of those pieces that draw, good until the next run; None
            where the forward is none of those that are captured, and nothing was run.
        """
        rows = kinds.get("decoding", [])
        prompts = [*kinds.get("continued", []), *kinds.get("whole", [])]
        key = self._key(rows, prompts)
        if key is None:
            return None
        self._wanted[key] += 1
        if self._wanted[key] <= WORTH:
            return None
        try:
            step, _ = self._runner.draw(
                lambda: self._loaded(key, rows, prompts, width, before), looks_first=True
            )
        except Exception as error:
            self.is_on = False
            self._runner.drop_steps()
            _log.warning("prompts beside those that decode run without a graph: %s", error)
            return None
        if step.input_ids.is_cuda and not step.replays:  # hooks, which a graph would not call
            self.is_on = False
        places = [*range(len(rows)), *(key[0] + i for i, one in enumerate(prompts) if one.draws)]
        return step.drawn().index_select(0, put(places, torch.int64, step.input_ids.device))

    def _key(self, rows: Sequence[Piece], prompts: Sequence[Piece]) -> tuple[int, int] | None:
        """Rows and tokens of the step that serves these; None where there is none."""
        count = sum(piece.end - piece.begin for piece in prompts)
        batch = next((size for size in ROWS if size >= len(rows)), None)
        tokens = next((size for size in TOKENS if size >= count), None)
        if not (self.is_on and rows and prompts) or len(prompts) > MAX_PROMPTS:
            return None
        return None if batch is None or tokens is None else (batch, tokens)

    def _loaded(
        self,
        key: tuple[int, int],
        rows: Sequence[Piece],
        prompts: Sequence[Piece],
        width: int,
        before: Launched | None,
    ) -> ChunkStep:
        step = self._runner.step_of(ChunkStep, key[0], width, key[1])
        requests = [piece.request for piece in (*rows, *prompts)]
        params = [self._asked_of(one).params for one in requests]
        chunks = [chunk_of(piece) for piece in rows], [chunk_of(piece) for piece in prompts]
        step.place(*chunks, params, drawn_counts(requests))
        take_ahead(step.input_ids, rows, before)
        return step
