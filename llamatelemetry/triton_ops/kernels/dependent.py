"""Programmatic dependent launch: a kernel is put on the GPU while the one before it ends."""

# mypy: ignore-errors
# (the bodies are Triton's language, and only look like Python)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def begin(IS_DEPENDENT: tl.constexpr):
    """The first line of a kernel that launch.dependent launches: it lets the next one come, and
    waits until all before it have written. Every such kernel waits, so what is written two kernels
    before is there too."""
    if IS_DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
