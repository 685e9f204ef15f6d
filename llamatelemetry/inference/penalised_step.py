"""A decode step for rows of which some have a repetition penalty."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llamatelemetry.inference.decode_step import DecodeStep
from llamatelemetry.inference.sampling import mark_seen_


class PenalisedStep(DecodeStep):
    """DecodeStep that knows which tokens its rows hold."""

    draws_outside = True
    _seen: Tensor | None = None

    def load_seen(self, rows: Sequence[Sequence[int]], vocab_size: int) -> None:
        """All tokens of each row; the step adds those that it draws."""
        if self._seen is None:
            shape = (len(rows), vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self.input_ids.device)
        mark_seen_(self._seen, rows)

    def _next_ids(self, logits: Tensor) -> Tensor:
        assert self._seen is not None, "load_seen comes before the first run"
        self._seen.scatter_(1, self.input_ids.unsqueeze(1), True)
        return self.sampling.sample(logits, self.offsets, self._seen, self._ops.sample)
