"""Linear layers of a byte a value on both sides: int8, or fp8 e4m3."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from llamatelemetry import ops

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class W8A8Linear(nn.Module):
    """``x @ weightᵀ + bias`` with both quantised row by row, x at every call.

    Attributes:
        weight: [out_features, in_features] int8 or float8_e4m3fn
        weight_scales: [out_features, 1] float32

    Example:
        >>> linear = torch.nn.Linear(64, 8, bias=False)
        >>> W8A8Linear.of(linear, "int8")(torch.ones(2, 64)).shape
        torch.Size([2, 8])
    """

    weight: Tensor
    weight_scales: Tensor
    bias: nn.Parameter | None

    def __init__(
        self, weight: Tensor, weight_scales: Tensor, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scales", weight_scales)
        self.register_parameter("bias", bias)

    @classmethod
    def of(cls, linear: nn.Linear, kind: str = "int8") -> W8A8Linear:
        """The layer with linear's weights, rounded; its bias is shared."""
        with torch.no_grad():
            weight, scales = ops.quantize_rows(linear.weight.detach(), _dtype_of(kind))
        return cls(weight, scales, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(*ops.quantize_rows(x, self.weight.dtype), x.dtype)

    def multiply(self, q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Of rows that are quantised already, as rms_norm_quantize gives them."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return ops.scaled_linear(q, scales, self.weight, self.weight_scales, dtype, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> W8A8Linear:
        """Of .to(dtype) and the like: codes and scales keep the format's dtypes."""
        kind = self.weight.dtype
        # Not floating, so moved and never converted.
        self.weight = self.weight.view(torch.int8)
        self.weight_scales = self.weight_scales.view(torch.int32)
        try:
            super()._apply(fn, recurse)
        finally:
            self.weight = self.weight.view(kind)
            self.weight_scales = self.weight_scales.view(torch.float32)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.weight.dtype}"


def quantize_w8a8(
    model: nn.Module, kind: str = "int8", skip: Collection[str] = ("lm_head",)
) -> nn.Module:
    """Puts W8A8Linear in the place of the model's linears: half the memory of 16-bit weights.

    patch serves the norms of such a model; its attention, MLPs and layers it refuses by name, and
    they run as they are.

    Args:
        model: any module; it is changed. Its other modules stay, and so do linears whose weight
            another module shares, as a head tied to the embedding is.
        kind: "int8", or "fp8" for e4m3.
        skip: names whose linears stay: of a linear, of what holds it, or whole parts of its name,
            as "lm_head", "model.layers.0", "self_attn" and "mlp.down_proj" are.

    Returns:
        The model.

    Raises:
        RuntimeError: naming the argument, the rule and the value.

    Example:
        >>> quantize_w8a8(torch.nn.Sequential(torch.nn.Linear(64, 8)), "int8")
        Sequential(
          (0): W8A8Linear(64, 8, torch.int8)
        )
    """
    _dtype_of(kind)
    if isinstance(skip, str):
        raise RuntimeError(f"quantize_w8a8: skip must be a collection of names, got {skip!r}")
    holders: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    found = [
        (name, part)
        for name, part in model.named_modules()
        if type(part) is nn.Linear
        and holders[id(part.weight)] == 1
        and not any(f".{kept}." in f".{name}." for kept in skip)
    ]
    if not found:
        raise RuntimeError(
            f"quantize_w8a8: model must hold an nn.Linear outside skip={tuple(skip)}, got "
            f"{type(model).__name__} without one"
        )
    for name, part in found:
        if not name:
            return W8A8Linear.of(part, kind)
        model.set_submodule(name, W8A8Linear.of(part, kind))
    return model


def _dtype_of(kind: str) -> torch.dtype:
    if kind not in DTYPES:
        raise RuntimeError(f"quantize_w8a8: kind must be one of {sorted(DTYPES)}, got {kind!r}")
    return DTYPES[kind]
