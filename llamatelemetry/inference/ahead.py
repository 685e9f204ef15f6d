"""A run of a decode step until the host has seen its tokens: another may follow it at once."""

from __future__ import annotations

from typing import Any

import torch

from llamatelemetry.inference.decode_step import DecodeStep


class Run:
    """The last run of a step. Where the step runs ahead its tokens are copied, since the next run
    overwrites them.

    Attributes:
        step: that ran.
        versions: how often each weight had been changed in place by then; None if nobody asked.
    """

    def __init__(self, step: DecodeStep, versions: list[int] | None = None) -> None:
        self.step = step
        self.versions = versions
        self._copy: Any = None
        self._end: Any = None
        if not step.runs_ahead:
            return
        drawn = step.drawn()
        if drawn.is_cuda:
            self._copy = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True)
            self._copy.copy_(drawn, non_blocking=True)
            self._end = torch.cuda.Event()
            self._end.record(torch.cuda.current_stream(drawn.device))
        else:
            self._copy = drawn.clone()

    def tokens(self) -> list[int]:
        """The next token of each row, -1 for NaN; waits for the run."""
        if self._end is not None:
            self._end.synchronize()
        return tokens_of(self.step) if self._copy is None else self._copy.tolist()


def tokens_of(step: DecodeStep) -> list[int]:
    """What a step's run drew, -1 for NaN; waits for it."""
    if step.input_ids.is_cuda:
        return step.drawn().tolist()
    tokens = step.input_ids.tolist()
    return step.drawn().tolist() if 0 in tokens else tokens  # 0: what NaN alone gives
