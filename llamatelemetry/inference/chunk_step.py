"""One forward over rows that decode and pieces of prompts, recorded or captured for all later ones
of as many."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.inference.decode_step import DecodeStep
from llamatelemetry.inference.sampling import GREEDY, SamplingParams
from llamatelemetry.inference.step import Chunk
from llamatelemetry.inference.step_graphs import StepGraphs
from llamatelemetry.inference.step_tensors import StepTensors
from llamatelemetry.models.step_input import DecoderState

MAX_PROMPTS = 4  # of which one forward runs on a piece each


class ChunkStep(DecodeStep):
    """DecodeStep of rows with one token each, then pieces of prompts, which draws one token after
    the last of each row and of each piece.

    Nothing moves on by itself: place, and not load, hold or add_blocks, says where all stand before
    every run. What is short of num_tokens is filled with tokens that write nothing and that no
    attention reads.

    Args:
        batch: rows.
        num_tokens: of all pieces of prompts together at most.

    Attributes:
        logits: not kept: other graphs have their memory.
    """

    def __init__(
        self,
        model: Any,
        state: DecoderState,
        batch: int,
        width: int,
        size: int,
        graphs: StepGraphs | None = None,
        num_tokens: int = 1,
    ) -> None:
        device = state.caches[0][0].device
        count, total = batch + MAX_PROMPTS, batch + num_tokens
        self._batch = batch
        more = MAX_PROMPTS + 1  # where each piece of a prompt begins among those of prompts
        tensors = StepTensors(total, count, width, count, device, keeps=True, num_more=more)
        self._lay(tensors)
        # Kept here too, where buffers finds it.
        self._row_starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
        rows, prompts = slice(0, batch), slice(batch, None)
        self.input = tensors.input(num_tokens)
        self.input.parts = [
            (0, batch, tensors.part(rows, rows, self._row_starts, 1)),
            (batch, total, tensors.part(prompts, prompts, tensors.more, num_tokens)),
        ]
        self._drawn = torch.zeros(count, dtype=torch.int64, device=device)
        self._init_run(model, state, size, graphs)

    def place(
        self,
        rows: Sequence[Chunk],
        prompts: Sequence[Chunk],
        params: Sequence[SamplingParams],
        offsets: Sequence[int],
    ) -> None:
        """Says what the next run runs on.

        Args:
            rows: the last token of each that decodes, at least one and at most batch.
            prompts: pieces of prompts, at least one and at most MAX_PROMPTS.
            params: of rows and prompts, how the token after each is drawn.
            offsets: likewise, how many tokens it has drawn.
        """
        spare = self._batch - len(rows)
        # A spare row reads a key that there is, whatever it holds.
        chunks = [*rows, *[Chunk([0], 0, rows[0].table[:1])] * spare, *prompts]
        counts = [len(chunk.tokens) for chunk in chunks]
        left = [0] * (MAX_PROMPTS - len(prompts))
        ends = list(accumulate(counts))

        def of_all(values: Sequence[Any], blank: Any) -> list[Any]:
            """A value for each sequence, of those of rows and prompts."""
            values = list(values)
            begun = values[: len(rows)] + [blank] * spare + values[len(rows) :]
            return begun + [blank] * len(left)

        begun = [end - self._batch for end in ends[self._batch :]]
        self.tensors.place(
            chunks,
            [not len(rows) <= i < self._batch for i in range(len(chunks))],
            of_all(params, GREEDY),
            of_all(offsets, 0),
            self._page_size,
            kept=[end - 1 for end in ends] + left,
            more=[0, *begun, *[begun[-1]] * len(left)],
        )

    def drawn(self) -> Tensor:
        """What the last run drew after each row, then after each piece, [batch + MAX_PROMPTS]
        int64; -1 where logits are NaN. Undefined for what was not placed."""
        return self._drawn

    def _draw(self) -> None:
        lost = self.logits.isnan().any(-1)
        self._drawn.copy_(self._next_ids(self.logits).masked_fill(lost, -1))
        del self.logits
