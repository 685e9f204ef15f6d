"""Linear layers of a byte a value on both sides: int8, or fp8 e4m3."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from llamatelemetry import ops
from llamatelemetry._native.library import cpu_isa
from llamatelemetry.quantization.rows import RowFormat

MOST_OWN_ROWS = 64  # of e4m3 by our product; of more, torch's is faster
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class W8A8Linear(nn.Module):
    """``x @ weightᵀ + bias`` with both quantised, x at every call: a scale a row, or a block.

    Attributes:
        weight: [out_features, in_features] int8 or float8_e4m3fn
        weight_scales: [out_features, 1] float32; in blocks, a scale for each 128 x 128 weights and
            1 x 128 values of x
        takes: how x is quantised

    Example:
        >>> linear = torch.nn.Linear(64, 8, bias=False)
        >>> W8A8Linear.of(linear, "int8")(torch.ones(2, 64)).shape
        torch.Size([2, 8])
    """

    weight: Tensor
    weight_scales: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor,
        weight_scales: Tensor,
        bias: nn.Parameter | None = None,
        block: int | None = None,
    ) -> None:
        super().__init__()
        self.takes = RowFormat(weight.dtype, block)
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
        return self.multiply(*ops.quantize_rows(x, *self.takes), x.dtype)

    def multiply(self, q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Of rows that are quantised already, as rms_norm_quantize gives them.

        More than 64 rows of e4m3 with a scale each are torch's product on Hopper, for bfloat16,
        where it is faster than ours. Its sums may be in another order for another number of rows.
        """
        bias = None if self.bias is None else self.bias.to(dtype)
        if self._is_torchs(q, dtype):
            rows, by_column = q.flatten(0, -2), self.weight_scales.T
            out = torch._scaled_mm(
                rows, self.weight.T, scales.view(-1, 1), by_column, bias, out_dtype=dtype
            )
            return out.view(*q.shape[:-1], self.out_features)
        return ops.scaled_linear(
            q, scales, self.weight, self.weight_scales, dtype, bias, self.takes.block
        )

    def _is_torchs(self, q: Tensor, dtype: torch.dtype) -> bool:
        return (
            self.takes == (torch.float8_e4m3fn, None)
            and dtype == torch.bfloat16
            and q.numel() > MOST_OWN_ROWS * self.in_features
            and self.in_features % 16 == self.out_features % 16 == 0
            and not torch.compiler.is_compiling()
            and is_fast_on(q.device)
        )

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """nn.Linear with the weights that these stand for, expanded to dtype."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        scales = self.weight_scales
        if (block := self.takes.block) is not None:
            scales = scales.repeat_interleave(block, 0)[: self.out_features]
            scales = scales.repeat_interleave(block, 1)[:, : self.in_features]
        linear.weight = nn.Parameter((self.weight.float() * scales).to(dtype), requires_grad=False)
        if self.bias is not None:  # a copy: its dtype may differ from ours
            bias = self.bias.detach().to(dtype, copy=True)
            linear.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
        return linear

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

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Scales have the name that checkpoints give them, of blocks DeepSeek's."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + self._saved_scales] = destination.pop(f"{prefix}weight_scales")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if prefix + self._saved_scales in state_dict:
            scales = state_dict.pop(prefix + self._saved_scales)
            state_dict[f"{prefix}weight_scales"] = scales
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def _saved_scales(self) -> str:
        return "weight_scale" if self.takes.block is None else "weight_scale_inv"

    def extra_repr(self) -> str:
        block = "" if self.takes.block is None else f", block {self.takes.block}"
        return f"{self.in_features}, {self.out_features}, {self.weight.dtype}{block}"


def merge_w8a8_linears(linears: Sequence[W8A8Linear]) -> W8A8Linear | None:
    """One linear whose output is the linears' outputs side by side; None if they are not alike.

    Alike: codes, width and blocks, biases of one dtype in all or in none, and whole blocks of rows
    in all but the last. Their tensors become views of the merged ones, as in merge_quant_linears.
    """
    first = linears[0]
    block = first.takes.block or 1
    for linear in linears:
        if _kind(linear) != _kind(first) or (
            linear is not linears[-1] and linear.out_features % block
        ):
            return None
    weight = _joined(linears, "weight")
    merged = W8A8Linear(weight, _joined(linears, "weight_scales"), None, first.takes.block)
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if biases:
        bias = torch.cat([part.data for part in biases])
        for part, view in zip(biases, bias.split([len(part) for part in biases]), strict=True):
            part.data = view
        merged.bias = nn.Parameter(bias, requires_grad=False)
    return merged


@cache
def is_fast_on(device: torch.device) -> bool:
    """Whether products of bytes have tensor cores and kernels there.

    They beat weights kept in 8 bits; 16-bit weights are faster than blocks in O at 64 rows, and at
    2048.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def beats_weights_alone(takes: RowFormat, device: torch.device) -> bool:
    """Whether quantised rows take less time there than weights that alone are in 8 bits.

    On the CPU those of e4m3 with a scale a row, at AVX2: benchmarks/notes/gemm.md, "A byte a value
    on the CPU". With AVX-512 many rows are level and 16 slower, and int8 is slower at both.
    """
    if device.type == "cpu":
        return takes == (torch.float8_e4m3fn, None) and cpu_isa() == "avx2"
    return is_fast_on(device)


def _kind(linear: W8A8Linear) -> tuple[object, ...]:
    bias = None if linear.bias is None else (linear.bias.dtype, linear.bias.device)
    return linear.takes, linear.in_features, linear.weight.device, bias


def _joined(linears: Sequence[W8A8Linear], name: str) -> Tensor:
    """Buffers of that name one under another; the linears keep views of it."""
    parts = [getattr(linear, name) for linear in linears]
    whole = torch.cat(parts)
    for linear, view in zip(linears, whole.split([len(part) for part in parts]), strict=True):
        setattr(linear, name, view)
    return whole


def quantize_w8a8(
    model: nn.Module, kind: str = "int8", skip: Collection[str] = ("lm_head",)
) -> nn.Module:
    """Puts W8A8Linear in the place of the model's linears: half the memory of 16-bit weights.

    patch serves such a model: norms and gates quantise what they give, and q, k and v are one
    product, as are gate and up. save_pretrained writes it as compressed-tensors has it, which
    load_model reads; where it would not, save_pretrained refuses.

    On a CPU "int8" multiplies bytes (AVX2, AVX-512 VNNI), and one row of either takes less time
    than with dense float32 weights. "fp8" weights become float32 on their way to the product, so
    that many rows may be slower, 128 at AVX2 0.7 to 0.9 of float32's speed:
    benchmarks/notes/gemm.md, "A byte a value on the CPU". What save_pretrained wrote is read there
    as GroupLinear where in_features is a multiple of 32, except "fp8" at AVX2: the same weights in
    8 bits, but inputs are not quantised row by row, so logits differ.

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
    from llamatelemetry.quantization.saving import (
        describe_quantised,  # which asks for these linears
    )

    _dtype_of(kind)
    if not isinstance(model, nn.Module):
        raise RuntimeError(f"quantize_w8a8: model must be an nn.Module, got {type(model).__name__}")
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
    describe_quantised(model)
    return model


def _dtype_of(kind: str) -> torch.dtype:
    if kind not in DTYPES:
        raise RuntimeError(f"quantize_w8a8: kind must be one of {sorted(DTYPES)}, got {kind!r}")
    return DTYPES[kind]
