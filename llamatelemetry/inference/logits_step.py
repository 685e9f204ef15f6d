"""A decode step that takes its tokens from the caller and ends in logits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llamatelemetry.inference.runner import DecodeStep
from llamatelemetry.inference.step import Chunk


class LogitsStep(DecodeStep):
    """DecodeStep whose next tokens are for the caller to choose.

    Attributes:
        logits: [batch, vocab_size] of the last run or, once there is a recording or a graph, what
            each run overwrites.
    """

    logits: Tensor
    _first: Tensor | None = None  # of a run that was no replay

    def place(self, owner: object, tables: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        """Puts rows in place, whose keys are in the cache but for those of the tokens to come.

        Args:
            owner: a name for them.
            tables: blocks of each row.
            lengths: tokens of each row whose keys are in the cache, at least one.
        """
        rows = [Chunk([0], length, table) for length, table in zip(lengths, tables, strict=True)]
        self.load(owner, rows, self.sampling, [0] * len(rows), [True] * len(rows))

    def step(self, input_ids: Tensor) -> Tensor:
        """Logits [batch, vocab_size] after one more token of each row, the caller's to keep.

        Args:
            input_ids: [batch] int64; every row stands one position further afterwards.
        """
        self.input_ids.copy_(input_ids)
        self._first = None
        self.run()
        logits = self.logits if self._first is None else self._first
        self._first = None
        return logits.clone()

    def _next_ids(self, logits: Tensor) -> Tensor:
        self.logits = logits
        if self._first is None:  # the capture that follows a first run computes nothing
            self._first = logits
        return self.input_ids
