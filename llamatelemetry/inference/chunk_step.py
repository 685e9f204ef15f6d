"""One forward over rows that decode and pieces of prompts, recorded or captured for all later ones
of as many."""

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

MAX_PROMPTS = 4  # of which one forward runs on a piece each
_BLANK = Chunk([0], 0, [])


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
        # All inputs lie in three tensors, for each copy to a GPU has a price.
        self._words = torch.zeros(3 * total + 3 * count, dtype=torch.int64, device=device)
        self.input_ids, positions, slots, kept, self.offsets, seeds = self._words.split(
            [total] * 3 + [count] * 3
        )
        sizes = [count * width, count, count + 1, MAX_PROMPTS + 1, count]
        self._counts = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        table, lengths, starts, prompt_starts, top_k = self._counts.split(sizes)
        self._reals = torch.ones(4, count, dtype=torch.float32, device=device)
        temperature, top_p, min_p, penalty = self._reals
        self.sampling = SamplingTensors(temperature, top_k, top_p, min_p, seeds, penalty)
        table = table.view(count, width)
        row_starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
        parts = [
            (begin, end, StepInput(
                positions=positions[begin:end],
                slot_mapping=slots[begin:end],
                block_table=table[rows],
                cache_seqlens=lengths[rows],
                cu_seqlens_q=begins,
                max_seqlen_q=longest,
                is_whole=False,
            ))
            for begin, end, rows, begins, longest in (
                (0, batch, slice(0, batch), row_starts, 1),
                (batch, total, slice(batch, count), prompt_starts, num_tokens),
            )
        ]  # fmt: skip
        self.input = StepInput(
            positions=positions,
            slot_mapping=slots,
            block_table=table,
            cache_seqlens=lengths,
            cu_seqlens_q=starts,
            max_seqlen_q=num_tokens,
            is_whole=False,
            kept=kept,
            parts=parts,
        )
        self._drawn = torch.zeros(count, dtype=torch.int64, device=device)
        self._init_run(model, state, size, graphs)
        self._real_values: list[list[float]] = []

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
        padding = len(self.input_ids) - sum(counts)
        size, slots = self._page_size, []
        for i, chunk in enumerate(chunks):
            places = range(chunk.begin, chunk.begin + counts[i])
            if len(rows) <= i < self._batch:
                slots.append(-1)
            else:
                slots += [chunk.table[at // size] * size + at % size for at in places]
        ends = list(accumulate(counts))

        def of_all(values: Sequence[Any], blank: Any) -> list[Any]:
            """A value for each sequence, of those of rows and prompts."""
            values = list(values)
            begun = values[: len(rows)] + [blank] * spare + values[len(rows) :]
            return begun + [blank] * len(left)

        kinds = of_all(params, GREEDY)
        words = [token for chunk in chunks for token in chunk.tokens] + [0] * padding
        for chunk, count in zip(chunks, counts, strict=True):
            words += range(chunk.begin, chunk.begin + count)
        words += [0] * padding + slots + [-1] * padding
        words += [end - 1 for end in ends] + left
        words += of_all(offsets, 0) + [one.seed for one in kinds]
        _put(self._words, words)
        numbers = [
            block
            for chunk in chunks
            for block in (*chunk.table, *[-1] * (self.width - len(chunk.table)))
        ]
        numbers += [-1] * (self.width * len(left))
        numbers += [chunk.begin + n for chunk, n in zip(chunks, counts, strict=True)] + left
        numbers += [0, *ends, *[ends[-1]] * len(left)]
        numbers += [0, *(end - self._batch for end in ends[self._batch :])]
        numbers += [ends[-1] - self._batch] * len(left)
        _put(self._counts, numbers + [one.top_k for one in kinds])
        reals = [
            [getattr(one, name) for one in kinds]
            for name in ("temperature", "top_p", "min_p", "repetition_penalty")
        ]
        if reals != self._real_values:
            _put(self._reals, reals)
            self._real_values = reals

    def drawn(self) -> Tensor:
        """What the last run drew after each row, then after each piece, [batch + MAX_PROMPTS]
        int64; -1 where logits are NaN. Undefined for what was not placed."""
        return self._drawn

    def _draw(self) -> None:
        lost = self.logits.isnan().any(-1)
        self._drawn.copy_(self._next_ids(self.logits).masked_fill(lost, -1))
        del self.logits


def _put(target: Tensor, values: Sequence[object]) -> None:
    tensor = torch.tensor(values, dtype=target.dtype)
    target.copy_(tensor.pin_memory() if target.is_cuda else tensor, non_blocking=True)
