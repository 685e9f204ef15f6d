"""Tensors of a GGUF file, put where a transformers model has their parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llamatelemetry import ops
from llamatelemetry.loading.gguf_file import GgufFile, GgufTensor
from llamatelemetry.ops.formats import QuantFormat
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
        self.file, self.model, self.modules = file, model, experts
        self.device, self.dtype, self.exact = device, dtype, exact
        # layer -> part -> the tensor of all experts, or one of each by its number
        self._stacks: dict[int, dict[str, dict[int | None, GgufTensor]]] = {
            layer: {} for layer in experts
        }

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

    def stack(self, tensor: GgufTensor, path: str) -> set[str]:
        """Makes each row of a tensor the weight of a module in the list at path.

        Returns:
            The names of those weights.

        Raises:
            ModelFileError: for a shape that the modules do not take, or quantised rows.
        """
        modules: list[Any] = list(self.model.get_submodule(path).children())
        expected = (len(modules), *modules[0].weight.shape)
        if tensor.shape != expected or tensor.format is not None:
            kind = "dense" if tensor.format is None else tensor.format.name
            raise self.file.error(
                f"tensor {tensor.name} must be {expected} and dense, got {tensor.shape}, {kind}"
            )
        rows = self.file.dense(tensor).to(self.device, self.dtype, copy=True)
        for module, row in zip(modules, rows, strict=True):
            module.weight = nn.Parameter(row.clone(), requires_grad=False)
        self.file.release(tensor)
        return {f"{path}.{i}.weight" for i in range(len(rows))}

    def expert(self, tensor: GgufTensor, layer: int, part: str, number: int | None = None) -> None:
        """Takes "gate.weight" or another part of a layer's experts; the last makes their module.

        Args:
            number: of the expert that the tensor is of; None where it is of all.

        Raises:
            ModelFileError: for a shape that the module does not take.
        """
        stack, module = self._stacks[layer], self._experts(layer)
        found = stack.setdefault(part, {})
        if found and (number is None or None in found or number in found):
            other = next(iter(found.values()))
            raise self.file.error(f"tensor {tensor.name} comes beside {other.name}")
        count, *rest = _shape(module, part)
        if number is not None and number >= count:
            raise self.file.error(f"tensor {tensor.name} must be of one of {count} experts")
        expected = (count, *rest) if number is None else tuple(rest)
        if tensor.shape != expected:
            raise self.file.error(f"tensor {tensor.name} must be {expected}, got {tensor.shape}")
        if tensor.format is not None and part.endswith(".bias"):
            format = tensor.format.name
            raise self.file.error(f"tensor {tensor.name} must not be quantised, got {format}")
        found[number] = tensor
        if not self._missing(layer):
            formats = {name: self._format(stack[f"{name}.weight"]) for name in PARTS}
            values = {name: self._stacked(tensors) for name, tensors in stack.items()}
            if any(formats.values()):
                module = QuantExperts(module, values, formats, self.exact)
            else:
                module = fill_experts(module, values)
            self.model.set_submodule(self.modules[layer], module)

    def _format(self, tensors: dict[int | None, GgufTensor]) -> QuantFormat | None:
        first = next(iter(tensors.values()))
        if other := next((t for t in tensors.values() if t.format != first.format), None):
            raise self.file.unserved(
                f"tensors {first.name} and {other.name} must have one type, as the experts of a "
                "layer are one tensor here"
            )
        return first.format

    def parameters_of_experts(self) -> set[str]:
        """Names of the parameters that expert makes."""
        return {
            f"{path}.{name}"
            for path in self.modules.values()
            for name, _ in self.model.get_submodule(path).named_parameters()
        }

    def missing_of_experts(self) -> set[str]:
        """Parts that the file has not, of layers with experts."""
        return {
            f"{path}.{part}"
            for layer, path in self.modules.items()
            for part in self._missing(layer)
        }

    def _missing(self, layer: int) -> list[str]:
        stack, module = self._stacks[layer], self._experts(layer)
        if isinstance(module, QuantExperts) or not any(p.is_meta for p in module.parameters()):
            return []  # made
        kinds = ["weight", "bias"] if getattr(module, "has_bias", False) else ["weight"]
        missing = []
        for part in (f"{part}.{kind}" for part in PARTS for kind in kinds):
            found, count = stack.get(part, {}), _shape(module, part)[0]
            if None not in found and len(found) < count:
                lost = [number for number in range(count) if number not in found]
                missing.append(f"{lost[0]}.{part}" if found else part)
        return missing

    def _experts(self, layer: int) -> nn.Module:
        return self.model.get_submodule(self.modules[layer])

    def _stacked(self, tensors: dict[int | None, GgufTensor]) -> Tensor:
        """The tensor of all experts, dense or each expert's rows packed."""
        if None in tensors:
            return self._loaded(tensors[None])
        return torch.stack([self._loaded(tensors[number]) for number in range(len(tensors))])

    def _loaded(self, tensor: GgufTensor) -> Tensor:
        if tensor.format is None:
            values = self.file.dense(tensor).to(self.device, self.dtype, copy=True)
        else:
            rows = self.file.rows(tensor).to(self.device)
            matrices = rows.view(-1, tensor.shape[-2], rows.shape[-1])
            values = torch.stack([ops.repack(one, tensor.format) for one in matrices])
            values = values if len(tensor.shape) == 3 else values[0]
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
