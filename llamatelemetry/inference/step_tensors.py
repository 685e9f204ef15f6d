"""Where the inputs of a step that is recorded or captured lie, and how the host puts them there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from llamatelemetry.inference.sampling import SamplingParams, SamplingTensors
from llamatelemetry.inference.step import Chunk
from llamatelemetry.models.step_input import StepInput

_ALIGNED = 16  # bytes: where each input begins, as some kernel's vectors may want it


class StepTensors:
    """All inputs of a step, in three tensors, for each copy to a GPU has a price.

    Args:
        num_tokens: of all sequences together.
        batch: sequences.
        width: columns of the block table.
        num_drawn: tokens that are drawn.
        device: of all.
        keeps: whether there are places whose logits are kept, one for each drawn token.
        num_more: int32 numbers that the step has beside.

    Attributes:
        input_ids, positions, slots: [num_tokens] int64.
        kept, offsets: [num_drawn] int64; kept is None where nothing says which.
        table: [batch, width] int32.
        lengths, starts: [batch] and [batch + 1] int32, as cache_seqlens and cu_seqlens_q.
        more: [num_more] int32.
        sampling: SamplingTensors of num_drawn rows.
    """

    def __init__(
        self,
        num_tokens: int,
        batch: int,
        width: int,
        num_drawn: int,
        device: torch.device,
        *,
        keeps: bool = False,
        num_more: int = 0,
    ) -> None:
        self._words = _Segments(
            [num_tokens] * 3 + [num_drawn * keeps] + [num_drawn] * 2, torch.int64, device
        )
        self.input_ids, self.positions, self.slots, kept, self.offsets, seeds = self._words.views
        self.kept = kept if keeps else None
        sizes = [batch * width, batch, batch + 1, num_more, num_drawn]
        self._counts = _Segments(sizes, torch.int32, device)
        table, self.lengths, self.starts, self.more, top_k = self._counts.views
        self.table = table.view(batch, width)
        self._reals = _Segments([num_drawn] * 4, torch.float32, device)
        temperature, top_p, min_p, penalty = self._reals.views
        self.sampling = SamplingTensors(temperature, top_k, top_p, min_p, seeds, penalty)
        self._real_values: list[list[float]] = []

    def input(self, longest: int, *, keeps_all: bool = False) -> StepInput:
        """The StepInput of these tensors, of sequences of at most longest tokens."""
        return StepInput(
            positions=self.positions,
            slot_mapping=self.slots,
            block_table=self.table,
            cache_seqlens=self.lengths,
            cu_seqlens_q=self.starts,
            max_seqlen_q=longest,
            is_whole=False,
            kept=self.kept,
            keeps_all=keeps_all,
        )

    def part(self, tokens: slice, rows: slice, starts: Tensor, longest: int) -> StepInput:
        """What attention reads of some sequences alone.

        Args:
            tokens, rows: which they are.
            starts: [sequences + 1] int32, where each begins among these tokens.
            longest: tokens of one at most.
        """
        return StepInput(
            positions=self.positions[tokens],
            slot_mapping=self.slots[tokens],
            block_table=self.table[rows],
            cache_seqlens=self.lengths[rows],
            cu_seqlens_q=starts,
            max_seqlen_q=longest,
            is_whole=False,
        )

    def copy_sampling_(self, sampling: SamplingTensors) -> None:
        """Puts how each token is drawn in place, as place does with the params it is given."""
        self.sampling.copy_(sampling)
        self._real_values = []

    def place(
        self,
        chunks: Sequence[Chunk],
        writes: Sequence[bool],
        params: Sequence[SamplingParams],
        offsets: Sequence[int],
        page_size: int,
        kept: Sequence[int] = (),
        more: Sequence[int] = (),
    ) -> None:
        """Puts sequences in place. What is short of num_tokens is filled with tokens that write
        nothing, what is short of batch with sequences of none.

        Args:
            chunks: of each sequence the tokens whose keys are not in the cache, blocks for them in
                the table.
            writes: of each whether its keys and values are written.
            params: how each token is drawn, num_drawn of them.
            offsets: how many its sequence has drawn before, likewise.
            page_size: tokens in a block.
            kept, more: as they are to be.
        """
        counts = [len(chunk.tokens) for chunk in chunks]
        spare, left = len(self.input_ids) - sum(counts), len(self.lengths) - len(chunks)
        runs = [range(c.begin, c.begin + n) for c, n in zip(chunks, counts, strict=True)]
        slots: list[int] = []
        for chunk, run, is_written in zip(chunks, runs, writes, strict=True):
            table = chunk.table
            slots += (
                [table[at // page_size] * page_size + at % page_size for at in run]
                if is_written
                else [-1] * len(run)
            )
        self._words.put(
            [
                [*chain.from_iterable(chunk.tokens for chunk in chunks), *[0] * spare],
                [*chain.from_iterable(runs), *[0] * spare],
                slots + [-1] * spare,
                kept,
                offsets,
                [one.seed for one in params],
            ]
        )
        width = self.table.shape[1]
        blocks = [
            block
            for chunk in chunks
            for block in (*chunk.table, *[-1] * (width - len(chunk.table)))
        ]
        ends = list(accumulate(counts))
        self._counts.put(
            [
                blocks + [-1] * (width * left),
                [run.stop for run in runs] + [0] * left,
                [0, *ends, *[ends[-1]] * left],
                more,
                [one.top_k for one in params],
            ]
        )
        reals = [
            [one.temperature for one in params],
            [one.top_p for one in params],
            [one.min_p for one in params],
            [one.repetition_penalty for one in params],
        ]
        if reals != self._real_values:
            self._reals.put(reals)
            self._real_values = reals


class _Segments:
    """Tensors one behind the other in one."""

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        unit = _ALIGNED // dtype.itemsize
        spans = [-(-size // unit) * unit for size in sizes]
        self._whole = torch.zeros(sum(spans), dtype=dtype, device=device)
        parts = self._whole.split(spans)
        self.views = [part[:size] for part, size in zip(parts, sizes, strict=True)]
        self._pads = [span - size for span, size in zip(spans, sizes, strict=True)]

    def put(self, values: Sequence[Sequence[object]]) -> None:
        """All at once, in one copy that the host does not wait for."""
        flat: list[object] = []
        for some, view, pad in zip(values, self.views, self._pads, strict=True):
            assert len(some) == len(view), (len(some), len(view))  # else all behind would move
            flat += some
            flat += [0] * pad
        tensor, target = torch.tensor(flat, dtype=self._whole.dtype), self._whole
        target.copy_(tensor.pin_memory() if target.is_cuda else tensor, non_blocking=True)
