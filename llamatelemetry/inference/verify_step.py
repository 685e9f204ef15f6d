"""A forward over a few tokens of each row, recorded or captured: the tokens drawn after each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.inference.decode_step import DecodeStep
from llamatelemetry.inference.sampling import GREEDY, SamplingParams
from llamatelemetry.inference.step import Chunk
from llamatelemetry.inference.step_graphs import StepGraphs
from llamatelemetry.inference.step_tensors import StepTensors
from llamatelemetry.models.step_input import DecoderState

_BLANK = Chunk([0], 0, [])


class VerifyStep(DecodeStep):
    """DecodeStep of up to ``longest`` tokens a row, which draws a token after each of them.

    Rows do not move on by themselves: place, and not load, hold or add_blocks, says where they
    stand before every run.

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
        self._lay(StepTensors(num_tokens, batch, width, num_tokens, device))
        self.input = self.tensors.input(longest, keeps_all=True)
        self._drawn = torch.zeros_like(self.input_ids)  # on CUDA, with -1 for NaN
        self._init_run(model, state, size, graphs)
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
        counts = [len(row.tokens) for row in rows]
        spare = len(self.input_ids) - sum(counts)
        kinds = [one for one, count in zip(params, counts, strict=True) for _ in range(count)]
        drawn = [offset + i for offset, n in zip(offsets, counts, strict=True) for i in range(n)]
        self.tensors.place(
            rows,
            [index < num_active for index in range(len(rows))],
            kinds + [GREEDY] * spare,
            drawn + [0] * spare,
            self._page_size,
        )

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
