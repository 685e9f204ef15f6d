"""Which op has a kernel for which device; a CUDA call that no kernel serves says why."""

from __future__ import annotations

import torch

from llamatelemetry._native import library

library.load_libraries()  # defines the ops, or raises with the cause and the way out


def op_names() -> list[str]:
    """Every op of the package, in alphabetical order."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.partition("::")[2] for name in names if name.startswith("llamatelemetry::"))


def has_kernel(op: str, key: str) -> bool:
    """Whether op has a kernel for a dispatch key, "CPU" or "CUDA"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"llamatelemetry::{op}", key)


def _refuse_cuda(op: str, reason: str) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError(f"{op}: tensors must be on the CPU, got CUDA tensors; {reason}")

    _refusals.impl(op, refuse, "CUDA")


_refusals = torch.library.Library("llamatelemetry", "IMPL")

# Ops that no CUDA kernel serves, and why.
without_cuda = {
    op: library.why_no_cuda_library() or "it has a CPU kernel only"
    for op in op_names()
    if not has_kernel(op, "CUDA")
}
for _op, _reason in without_cuda.items():
    _refuse_cuda(_op, _reason)
