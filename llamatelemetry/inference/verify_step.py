"""A forward over a few tokens of each row, recorded or captured: the tokens drawn after each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.inference.decode_step import DecodeStep
from llamatelemetry.inference.sampling import GREEDY, SamplingParams, SamplingTensors
from llamatelemetry.inference.step import Chunk
from llamatelemetry.inference.step_graphs import StepGraphs
from llamatelemetry.models.step_input import DecoderState, StepInput

_BLANK = Chunk([0], 0, [])


class VerifyStep(DecodeStep):
    """DecodeStep of up to ``longest`` tokens a row, which draws a token after each of them.

    Rows do not move on by themselves: place, and not load, hold or add_blocks, says where they
    stand before every run. All inputs lie in three tensors, for each copy to a GPU has a price.

    Args:
        num_tokens: of all rows together; at most so many are placed, and at least one a row.
        longest: tokens of one row at most.

    Attributes:
        logits: [num_tokens, vocab_size] of the last run; what lies past the placed tokens is
            undefined, here and in drawn.
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
        longest: int = 1,
    ) -> None:
        device = state.caches[0][0].device
        self._words = torch.zeros(5, num_tokens, dtype=torch.int64, device=device)
        self._counts = torch.zeros(
            batch * (width + 2) + 1 + num_tokens, dtype=torch.int32, device=device
        )
        self._reals = torch.ones(4, num_tokens, dtype=torch.float32, device=device)
        self.input_ids, positions, slots, self.offsets, seeds = self._words
        table, lengths, starts, top_k = self._counts.split(
            [batch * width, batch, batch + 1, num_tokens]
        )
        temperature, top_p, min_p, penalty = self._reals
        self.sampling = SamplingTensors(temperature, top_k, top_p, min_p, seeds, penalty)
        self.input = StepInput(
            positions=positions,
            slot_mapping=slots,
            block_table=table.view(batch, width),
            cache_seqlens=lengths,
            cu_seqlens_q=starts,
            max_seqlen_q=longest,
            is_whole=False,
            keeps_all=True,
        )
        self._drawn = torch.zeros_like(self.input_ids)  # on CUDA, with -1 for NaN
        self._init_run(model, state, size, graphs)
        self._real_values: list[list[float]] = []
        self.place([_BLANK] * batch, [GREEDY] * batch, [0] * batch, 0)

    def place(
        self,
        rows: Sequence[Chunk],
        params: Sequence[SamplingParams],
        offsets: Sequence[int],
        num_active: int,
    ) -> None:
        """Says what the next run runs on.

        Args:
            rows: of each the tokens whose keys are not in the cache, blocks for them in the table.
            params: of each how the tokens after its own are drawn.
            offsets: of each how many tokens it has drawn before its last but drafted ones.
            num_active: leading rows that write keys and values; others only stand there.
        """
        size, spare = self._page_size, len(self.input_ids) - sum(len(row.tokens) for row in rows)
        words: list[list[int]] = [[], [], [], [], []]
        kinds: list[SamplingParams] = []
        for index, (row, one, offset) in enumerate(zip(rows, params, offsets, strict=True)):
            count = len(row.tokens)
            positions = range(row.begin, row.begin + count)
            slots = [-1] * count
            if index < num_active:
                slots = [row.table[at // size] * size + at % size for at in positions]
            more = (row.tokens, positions, slots, range(offset, offset + count), [one.seed] * count)
            for column, values in zip(words, more, strict=True):
                column += values
            kinds += [one] * count
        kinds += [GREEDY] * spare
        for column, value in zip(words, (0, 0, -1, 0, 0), strict=True):
            column += [value] * spare
        self._put(self._words, words, torch.int64)
        counts = [len(row.tokens) for row in rows]
        numbers = [
            block for row in rows for block in (*row.table, *[-1] * (self.width - len(row.table)))
        ]
        numbers += [row.begin + len(row.tokens) for row in rows]
        numbers += [0, *accumulate(counts), *(one.top_k for one in kinds)]
        self._put(self._counts, numbers, torch.int32)
        reals = [
            [one.temperature for one in kinds],
            [one.top_p for one in kinds],
            [one.min_p for one in kinds],
            [one.repetition_penalty for one in kinds],
        ]
        if reals != self._real_values:
            self._put(self._reals, reals, torch.float32)
            self._real_values = reals

    @staticmethod
    def _put(target: Tensor, values: Sequence[object], dtype: torch.dtype) -> None:
        tensor = torch.tensor(values, dtype=dtype)
        target.copy_(tensor.pin_memory() if target.is_cuda else tensor, non_blocking=True)

    def run(self) -> Tensor:
        """The tokens drawn after each of the placed ones, as drawn gives them."""
        is_first = self._replay is None
        super().run()
        if is_first and self.mode == "graph":  # a capture computes no logits
            super().run()
        return self.drawn()

    def drawn(self) -> Tensor:
        if self.input_ids.is_cuda:
            return self._drawn
        lost = (self._drawn == 0) & self.logits.isnan().any(-1)
        return self._drawn.masked_fill(lost, -1)

    def _draw(self) -> None:
        tokens = self._next_ids(self.logits)
        if tokens.is_cuda:
            lost = self.logits[:, 0].isnan()  # of a row of NaN alone: the sampler shuns others
            self._drawn.copy_(tokens.masked_fill(lost, -1))
        else:
            self._drawn = tokens
