"""Tensors of a GGUF file, put where a transformers model has their parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llamatelemetry import ops
from llamatelemetry.loading.gguf_file import GgufFile, GgufTensor
from llamatelemetry.quantization.experts import PARTS, QuantExperts, fill_experts
from llamatelemetry.quantization.modules import QuantEmbedding, QuantLinear


class Place:
    """Fills the skeleton of a model, tensor by tensor.

    Args:
        file: that the tensors are of; their pages are given back once they are read
        model: on meta
        experts: layer -> the name of its module of routed experts
        device, dtype, exact: as in build_model
    """

    def __init__(
        self,
        file: GgufFile,
        model: nn.Module,
        experts: dict[int, str],
        device: torch.device,
        dtype: torch.dtype,
        exact: bool,
    ) -> None:
        self.file, self.model, self.experts = file, model, experts
        self.device, self.dtype, self.exact = device, dtype, exact
        self._stacks: dict[int, dict[str, GgufTensor]] = {layer: {} for layer in experts}

    def tensor(self, tensor: GgufTensor, name: str, heads: int, one_added: bool) -> None:
        """Puts a tensor where the parameter of that name is, packed if the file has it quantised.

        Args:
            heads: whose rows are turned from pairs of neighbours to halves; 0 for none
            one_added: 1 is taken off

        Raises:
            ModelFileError: for a shape or a format that the module does not take.
        """
        path, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(path)
        expected = tuple(getattr(module, attribute).shape)
        if _squeezed(tensor.shape) != _squeezed(expected):
            raise self.file.error(f"tensor {tensor.name} must be {expected}, got {tensor.shape}")
        if tensor.format is None:
            values = _neox_order(self.file.dense(tensor), heads).view(expected)
            if one_added:
                values = values.float() - 1
            values = values.to(self.device, self.dtype, copy=True)
            setattr(module, attribute, nn.Parameter(values, requires_grad=False))
            self.file.release(tensor)
            return
        if attribute != "weight" or not isinstance(module, (nn.Linear, nn.Embedding)):
            format = tensor.format.name
            raise self.file.error(f"tensor {tensor.name} must not be quantised, got {format}")
        rows = _neox_order(self.file.rows(tensor), heads)
        packed = ops.repack(rows.to(self.device), tensor.format)
        replacement: nn.Module
        if isinstance(module, nn.Linear):
            replacement = QuantLinear(packed, tensor.format, expected[0], module.bias, self.exact)
        else:
            scale = getattr(module, "scalar_embed_scale", None)
            replacement = QuantEmbedding(packed, tensor.format, expected[0], self.dtype, scale)
        self.model.set_submodule(path, replacement)
        self.file.release(tensor)

    def expert(self, tensor: GgufTensor, layer: int, part: str) -> None:
        """Takes "gate.weight" or another part of a layer's experts; the last makes their module.

        Raises:
            ModelFileError: for a shape that the module does not take.
        """
        module, stack = self._experts(layer), self._stacks[layer]
        expected = _shape(module, part)
        if tensor.shape != expected:
            raise self.file.error(f"tensor {tensor.name} must be {expected}, got {tensor.shape}")
        if tensor.format is not None and part.endswith(".bias"):
            format = tensor.format.name
            raise self.file.error(f"tensor {tensor.name} must not be quantised, got {format}")
        stack[part] = tensor
        if not self._missing(layer):
            formats = {name: stack[f"{name}.weight"].format for name in PARTS}
            values = {name: self._stacked(found) for name, found in stack.items()}
            if any(formats.values()):
                module = QuantExperts(module, values, formats, self.exact)
            else:
                module = fill_experts(module, values)
            self.model.set_submodule(self.experts[layer], module)

    def parameters_of_experts(self) -> set[str]:
        """Names of the parameters that expert makes."""
        return {
            f"{path}.{name}"
            for path in self.experts.values()
            for name, _ in self.model.get_submodule(path).named_parameters()
        }

    def missing_of_experts(self) -> set[str]:
        """Parts that the file has not, of layers with experts."""
        return {
            f"{path}.{part}"
            for layer, path in self.experts.items()
            for part in self._missing(layer)
        }

    def _missing(self, layer: int) -> list[str]:
        stack = self._stacks[layer]
        if len(stack) == 2 * len(PARTS):
            return []
        kinds = ["weight"]
        if getattr(self._experts(layer), "has_bias", False):
            kinds.append("bias")
        return [f"{p}.{kind}" for p in PARTS for kind in kinds if f"{p}.{kind}" not in stack]

    def _experts(self, layer: int) -> nn.Module:
        return self.model.get_submodule(self.experts[layer])

    def _stacked(self, tensor: GgufTensor) -> Tensor:
        """A tensor of all experts, dense or each expert's rows packed."""
        if tensor.format is None:
            values = self.file.dense(tensor).to(self.device, self.dtype, copy=True)
        else:
            rows = self.file.rows(tensor).view(*tensor.shape[:2], -1)
            format = tensor.format
            values = torch.stack([ops.repack(one.to(self.device), format) for one in rows])
        self.file.release(tensor)
        return values


def _shape(module: nn.Module, part: str) -> tuple[int, ...]:
    """[experts, n, k] of a part's weight, [experts, n] of its bias."""
    name, kind = part.split(".")
    weight: Tensor = module.down_proj if name == "down" else module.gate_up_proj  # type: ignore[assignment]
    experts, n, k = weight.shape
    if module.is_transposed:
        n, k = k, n
    n = n if name == "down" else n // 2
    return (experts, n, k) if kind == "weight" else (experts, n)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _neox_order(rows: Tensor, heads: int) -> Tensor:
    """Rows (2i, 2i + 1) of each head, which one angle turns, to (i, i + head_dim / 2)."""
    if not heads:
        return rows
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
