"""Linear and embedding over packed quantised weights, which are never expanded in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llamatelemetry import ops
from llamatelemetry.ops.formats import TILE_ROWS, QuantFormat
from llamatelemetry.quantization.experts import LinearExperts, QuantExperts
from llamatelemetry.quantization.group_linear import GroupLinear
from llamatelemetry.quantization.w8a8 import W8A8Linear


class QuantLinear(nn.Module):
    """``x @ dequantize(weight)ᵀ + bias`` in place of nn.Linear.

    Attributes:
        weight: [ceil(out_features / 16), 16 * row_bytes] uint8, from ops.repack
        exact: float32 activations instead of int8 ones on the CPU
    """

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor,
        format: QuantFormat,
        out_features: int,
        bias: nn.Parameter | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.format = QuantFormat(format)
        self.in_features = _weights_per_row(weight, self.format)
        self.out_features = out_features
        self.exact = exact
        self.register_buffer("weight", weight)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        return ops.quant_linear(
            x,
            self.weight,
            self.format,
            self.out_features,
            self.bias,
            self.exact,
            activation=activation,
        )

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """nn.Linear with the same weights, expanded to dtype."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = _expanded(self, self.out_features, self.in_features, dtype)
        if self.bias is not None:  # a copy: its dtype may differ from ours
            bias = self.bias.detach().to(dtype, copy=True)
            linear.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
        return linear

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format.name}, exact={self.exact}"


class QuantEmbedding(nn.Module):
    """``dequantize(weight)[ids]`` in place of nn.Embedding; may share weight with a QuantLinear.

    Attributes:
        weight: [ceil(num_embeddings / 16), 16 * row_bytes] uint8, from ops.repack
        dtype: of the rows it returns; follows .to(dtype) as a parameter would
        scale: what the rows are multiplied by, rounded to dtype; None for nothing
    """

    weight: Tensor
    like: Tensor
    scale: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        format: QuantFormat,
        num_embeddings: int,
        dtype: torch.dtype,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.format = QuantFormat(format)
        self.num_embeddings = num_embeddings
        self.embedding_dim = _weights_per_row(weight, self.format)
        self.register_buffer("weight", weight)
        self.register_buffer("like", weight.new_empty(0, dtype=dtype), persistent=False)
        factor = None if scale is None else torch.tensor(scale, device=weight.device)
        self.register_buffer("scale", factor, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        rows = ops.quant_embedding(
            ids,
            self.weight,
            self.format,
            self.num_embeddings,
            self.embedding_dim,
            self.like.dtype,
        )
        return rows if self.scale is None else rows * self.scale.to(rows.dtype)

    def dense(self, dtype: torch.dtype) -> nn.Embedding:
        """nn.Embedding with the same weights, expanded to dtype."""
        weight = _expanded(self, self.num_embeddings, self.embedding_dim, dtype)
        if self.scale is None:
            return nn.Embedding.from_pretrained(weight.data)
        embedding = ScaledEmbedding.from_pretrained(weight.data)
        embedding.register_buffer("scale", self.scale, persistent=False)
        return embedding

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format.name}"


class ScaledEmbedding(nn.Embedding):
    """nn.Embedding whose rows are multiplied by scale, rounded to their dtype."""

    scale: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale.to(self.weight.dtype)


def merge_quant_linears(linears: Sequence[QuantLinear]) -> QuantLinear | None:
    """One linear whose output is the linears' outputs side by side; None if they are not alike.

    Alike: one format, one width, the same choice of exact, biases in all or in none, and whole
    tiles of rows in all but the last. The linears' weights and biases become views of the merged
    ones, so nothing is held twice and the state_dict keeps its keys and values.
    """
    first = linears[0]
    for linear in linears:
        if (
            (linear.format, linear.in_features, linear.exact)
            != (first.format, first.in_features, first.exact)
            or (linear.bias is None) != (first.bias is None)
            or (linear is not linears[-1] and linear.out_features % TILE_ROWS)
        ):
            return None
    weight = torch.cat([linear.weight for linear in linears])
    tiles = [linear.weight.shape[0] for linear in linears]
    for linear, view in zip(linears, weight.split(tiles), strict=True):
        linear.weight = view
    rows = [linear.out_features for linear in linears]
    merged = QuantLinear(weight, first.format, sum(rows), exact=first.exact)
    if first.bias is not None:
        biases = [linear.bias for linear in linears if linear.bias is not None]
        bias = torch.cat([part.data for part in biases])
        for part, view in zip(biases, bias.split(rows), strict=True):
            part.data = view
        merged.bias = nn.Parameter(bias, requires_grad=False)
    return merged


def _expanded(
    module: QuantLinear | QuantEmbedding, n: int, k: int, dtype: torch.dtype
) -> nn.Parameter:
    rows = ops.unpack(module.weight, module.format, n, k)
    values = ops.dequantize(rows, module.format, torch.float32).to(dtype)
    return nn.Parameter(values, requires_grad=False)


def _weights_per_row(weight: Tensor, format: QuantFormat) -> int:
    return weight.shape[1] // (TILE_ROWS * format.block_bytes) * format.block_size


def expand(module: nn.Module, dtype: torch.dtype) -> None:
    """Puts dense modules of dtype in the place of the quantised ones inside module."""
    kinds = QuantLinear, QuantEmbedding, QuantExperts, LinearExperts, GroupLinear, W8A8Linear
    done: tuple[str, ...] = ()
    for name, part in list(module.named_modules()):
        if isinstance(part, kinds) and not name.startswith(done):
            module.set_submodule(name, part.dense(dtype))
            done += (f"{name}.",)  # its parts went with it
