"""Launch configurations of the Triton kernels, a row for each kernel and architecture."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class KernelConfig:
    """How a Triton kernel is launched.

    Attributes:
        name: of the kernel.
        block_size: elements that a program takes at a time; a power of two.
        num_warps: warps of a program.
        num_stages: stages of Triton's software pipeline.

    Example:
        >>> KernelConfig("mine", num_warps=8)
        KernelConfig(name='mine', block_size=128, num_warps=8, num_stages=2)
    """

    name: str
    block_size: int = 128
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Tuning:
    """One row of the table.

    Attributes:
        config: what to launch with.
        measured_on: the GPU on which it was the best of a sweep; None for a start value that
            nobody has tuned yet.
        why: where the values come from.
    """

    config: KernelConfig
    measured_on: str | None
    why: str


_T4 = "the documented start values for T4"
_WIDE = "a start value: fewer and larger programs keep more loads in flight for HBM"
# (kernel, compute capability as major * 10 + minor); an architecture takes the row of the nearest
# one below it.
TUNED: dict[tuple[str, int], Tuning] = {
    ("add", 75): Tuning(KernelConfig("add", 128, 4, 2), None, _T4),
    ("add", 80): Tuning(KernelConfig("add", 1024, 4, 2), None, _WIDE),
    ("layernorm", 75): Tuning(KernelConfig("layernorm", 128, 4, 2), None, _T4),
    ("layernorm", 80): Tuning(KernelConfig("layernorm", 4096, 8, 2), None, _WIDE),
    ("softmax", 75): Tuning(KernelConfig("softmax", 128, 4, 2), None, _T4),
    ("softmax", 80): Tuning(KernelConfig("softmax", 4096, 8, 2), None, _WIDE),
}


def tuning_for(name: str, capability: tuple[int, int]) -> Tuning | None:
    """The row for a kernel on an architecture.

    Args:
        name: of the kernel.
        capability: compute capability, (major, minor).

    Returns:
        The row of the nearest architecture not above this one; None if there is none.
    """
    arch = capability[0] * 10 + capability[1]
    archs = [row for kernel, row in TUNED if kernel == name and row <= arch]
    return TUNED[name, max(archs)] if archs else None
