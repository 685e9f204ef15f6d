"""What every wrapper shares: the library is loaded, and gradients are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

import llamatelemetry._native.kernels  # noqa: F401  loads the libraries, which define the ops

_Fake = TypeVar("_Fake", bound=Callable[..., object])


def register_fake(op: str) -> Callable[[_Fake], _Fake]:
    """torch.library.register_fake for an op of ours, typed."""
    return torch.library.register_fake(f"llamatelemetry::{op}")


def inference_only(op: str, **tensors: Tensor | None) -> None:
    """Raises where autograd would need a backward that no op here has."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor) and tensor.requires_grad:  # torch refuses others
                raise RuntimeError(
                    f"{op}: {name} must not require grad while grad mode is on, got "
                    "requires_grad=True; call it under torch.inference_mode() or torch.no_grad()"
                )
