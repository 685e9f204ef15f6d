"""A transformers model around the weights of a GPTQ, AWQ, FP8, bitsandbytes or like directory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from llamatelemetry.loading.errors import ModelFileError, in_one_sentence
from llamatelemetry.loading.files import tensor_names, weight_files
from llamatelemetry.loading.loose_experts import LooseExperts, dense_linear
from llamatelemetry.loading.model_lists import is_ignored, is_of_ignored_layer, loaded_dtype
from llamatelemetry.quantization import w8a8
from llamatelemetry.quantization.bitsandbytes import read_four_bits
from llamatelemetry.quantization.checkpoints import load_linear, load_w8a8
from llamatelemetry.quantization.experts import expert_of
from llamatelemetry.quantization.group_linear import GroupLinear
from llamatelemetry.quantization.layouts import METHODS, Layout, layout_of
from llamatelemetry.quantization.mxfp4 import mxfp4_experts
from llamatelemetry.quantization.saving import Origin, describe_quantised, file_name_in
from llamatelemetry.quantization.w8a8 import W8A8Linear


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """What config.json says of weights that are read here; None where transformers reads them."""
    found = config.get("quantization_config") or config.get("compression_config")
    if isinstance(found, dict) and found.get("quant_method") in METHODS:
        return found
    return None


@torch.inference_mode(False)  # what patch merges later is as any other tensor, in any mode
@torch.no_grad()
def build_quantised(
    path: Path,
    config: Any,
    quantization: dict[str, Any],
    dtype: torch.dtype | None,
    device: torch.device,
    exact: bool,
) -> Any:
    """The directory's model in eval mode; most quantised linears stay packed, as GroupLinear.

    Linears of bitsandbytes' 4-bit codes become dense ones of dtype where their values are neither
    NF4's nor FP4's, or rows no whole blocks of 32, 64 or a multiple of 128 weights. Linears of
    formats that have their input quantised too are W8A8Linear where that is faster: on a Hopper
    GPU, and of e4m3 with a scale a row on a CPU at AVX2; and where rows are no whole blocks of 32.
    Routed experts become LinearExperts of these, gpt-oss's QuantExperts; dense ones stay
    transformers'.

    Args:
        path: of a directory with safetensors.
        config: transformers' of it.
        quantization: from quantization_of.
        dtype: of activations and of what is not quantised, but what the model lists as float32;
            None is that of config.json.
        device: where the weights go, and where they are unpacked.
        exact: float32 activations in the quantised linears instead of int8 ones on the CPU, and no
            W8A8Linear.

    Raises:
        ModelFileError: naming the tensor, if one is missing, unknown or not as it should be; for
            models that are not of text alone, or routed experts that are quantised in another way.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    layout = _layout(path, quantization)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelFileError(
            f"{path}: quantised weights are read of text models alone, got transformers' "
            f"{config.model_type}"
        )
    for name in ("quantization_config", "compression_config"):
        if hasattr(config, name):
            delattr(config, name)
    dtype = dtype or getattr(config, "dtype", None) or torch.float16
    with in_one_sentence(path), _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config.name_or_path = str(path)
    _Filling(path, model, layout, dtype, device, exact).fill()
    describe_quantised(model, Origin(takes_rows=layout.takes_rows))
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            raise ModelFileError(f"{path}: transformers' {config.model_type} leaves {name} unmade")
    return model.to(device).eval()


def _layout(path: Path, quantization: dict[str, Any]) -> Layout:
    try:
        return layout_of(quantization)
    except ValueError as error:
        raise ModelFileError(f"{path / 'config.json'}: quantization_config: {error}") from None


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made here have their buffers, and parameters without memory."""

    def on_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(on_meta)
    try:
        yield
    finally:
        handle.remove()


class _Filling:
    """Puts tensors of the files where a model has its parameters."""

    def __init__(
        self,
        path: Path,
        model: Any,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        exact: bool,
    ) -> None:
        self.path, self.model, self.layout = path, model, layout
        self.dtype, self.device, self.exact = dtype, device, exact
        self._whole: dict[str, set[str]] = {}  # quantised linear -> the tensors it has
        self._parts: dict[str, dict[str, Tensor]] = {}  # those that were read
        self._experts_apart = LooseExperts(model)
        self._renamed = file_name_in(model, ".block_sparse_moe.") == ".mlp."

    def fill(self) -> None:
        from safetensors import safe_open

        files = list(weight_files(self.path))
        if not files:
            raise ModelFileError(f"{self.path}: quantised weights must be in safetensors files")
        names = [self._split(name) for file in files for name in tensor_names(file)]
        names = [n for n in names if not is_of_ignored_layer(self.model, ".".join(n))]
        signs = {module for module, attribute in names if attribute in self.layout.signs}
        for module, attribute in names:
            if module in signs and attribute in self.layout.tensors:
                self._whole.setdefault(module, set()).add(attribute)
        for file in files:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118, safe_open is no mapping
                    self._take(name, tensors.get_tensor)
        self._finish()

    def _take(self, name: str, read: Any) -> None:
        module, attribute = self._split(name)
        if attribute in self._whole.get(module, ()):
            parts = self._parts.setdefault(module, {})
            parts[attribute] = read(name)
            if parts.keys() == self._whole[module]:
                self._linear(module, self._parts.pop(module))
            return
        owner, known = self._owner(module), None
        if owner is not None:
            known = owner._parameters.get(attribute, owner._buffers.get(attribute))
        if known is None:
            of_expert = attribute == "weight" and expert_of(module) is not None
            if not (of_expert and self._is_of_expert(module, {attribute: read(name)})):
                self._leave_out(name, read)
            return
        values = read(name)
        if values.shape != known.shape:
            raise ModelFileError(
                f"{self.path}: {name} must be {tuple(known.shape)} as config.json says, got "
                f"{tuple(values.shape)}"
            )
        if known.is_floating_point() and values.element_size() == 1:
            raise ModelFileError(
                f"{self.path}: {name} is {values.dtype} and has no {self.layout.signs[0]} beside it"
            )
        dtype = loaded_dtype(self.model, f"{module}.{attribute}", values.dtype, self.dtype)
        values = values.to(self.device, dtype, copy=True)
        if attribute in owner._buffers:  # type: ignore[union-attr]
            owner._buffers[attribute] = values  # type: ignore[union-attr]
        else:
            setattr(owner, attribute, nn.Parameter(values, requires_grad=False))

    def _leave_out(self, name: str, read: Any) -> None:
        """Refuses a tensor that the model has no place for, unless nothing is lost with it."""
        # GPTQ's files have a bias of zeros for each linear, whether the model has one or not.
        if is_ignored(self.model, name) or (name.endswith(".bias") and not read(name).any()):
            return
        self._refuse_experts(name)
        raise ModelFileError(
            f"{self.path}: the weights' {name} is no part of the {self.model.config.model_type} "
            "that config.json describes"
        )

    def _refuse_experts(self, name: str) -> None:
        if re.search(r"\.experts\.\d+(\.|$)", name):
            raise ModelFileError(
                f"{self.path}: {name}: each routed expert must have gate, up and down and be "
                "laid out as Mixtral's, or they must be gpt-oss's in MXFP4"
            )

    def _owner(self, module: str) -> nn.Module | None:
        try:
            return self.model.get_submodule(module)
        except AttributeError:
            return None

    def _linear(self, name: str, parts: dict[str, Tensor]) -> None:
        """Puts what the parts make in the place of the linear, or the experts, of that name."""
        owner = self._owner(name)
        if owner is not None and self.layout.method == "mxfp4":
            self._experts(name, owner, parts)
            return
        if self._is_of_expert(name, parts):
            return
        if type(owner) is not nn.Linear:
            self._refuse_experts(name)
            kind = "nothing" if owner is None else f"a {type(owner).__name__}"
            raise ModelFileError(
                f"{self.path}: {name} is quantised and must be a Linear of transformers' "
                f"{self.model.config.model_type}, which has {kind} there"
            )
        linear = self._made(name, parts, (owner.out_features, owner.in_features))
        linear.register_parameter("bias", owner.bias)
        self.model.set_submodule(name, linear)

    def _is_of_expert(self, name: str, parts: dict[str, Tensor]) -> bool:
        """Takes a linear of one of several routed experts, which the model has as one module."""
        try:
            sizes = self._experts_apart.sizes_of(name)
        except ValueError as error:
            raise ModelFileError(f"{self.path}: {name}: {error}") from None
        if sizes is None:
            return False
        self._experts_apart.put(name, self._made(name, parts, sizes))
        return True

    def _made(
        self, name: str, parts: dict[str, Tensor], sizes: tuple[int, int]
    ) -> nn.Linear | GroupLinear | W8A8Linear:
        """A linear of a file's tensors and these sizes [n, k], without its bias."""
        try:
            on_device = {part: tensor.to(self.device) for part, tensor in parts.items()}
            linear = self._linear_of(on_device)
            if (linear.out_features, linear.in_features) != sizes:
                raise ValueError(
                    f"it must be {sizes} as config.json says, got "
                    f"{(linear.out_features, linear.in_features)}"
                )
        except ValueError as error:
            raise ModelFileError(f"{self.path}: {name}: {error}") from None
        return linear

    def _linear_of(self, parts: dict[str, Tensor]) -> nn.Linear | GroupLinear | W8A8Linear:
        if parts.keys() == {"weight"}:
            return dense_linear(parts["weight"], self.dtype)
        if self.layout.method == "bitsandbytes" and self.layout.bits == 4:
            read = read_four_bits(parts)
            if (packed := read.packed()) is None:
                return read.dense(self.dtype)
            n, k = read.codes.shape
            return GroupLinear(packed, k, n, None, None, self.exact)
        # GroupLinear, whose weights alone are in 8 bits, has whole blocks of 32.
        if self.layout.takes_rows and not self.exact:
            linear = load_w8a8(self.layout, parts)
            if linear is not None and (
                w8a8.beats_weights_alone(linear.takes, self.device) or linear.in_features % 32
            ):
                return linear
        weight, (n, k), perm = load_linear(self.layout, parts)
        return GroupLinear(weight, k, n, None, perm, self.exact)

    def _experts(self, name: str, owner: nn.Module, parts: dict[str, Tensor]) -> None:
        on_device = {part: tensor.to(self.device) for part, tensor in parts.items()}
        try:
            experts = mxfp4_experts(owner, on_device, self.dtype, self.exact)
        except ValueError as error:
            raise ModelFileError(f"{self.path}: {name}: {error}") from None
        self.model.set_submodule(name, experts)

    def _finish(self) -> None:
        """Ties what is tied, refuses what is missing."""
        self.model.tie_weights()
        if missing := sorted(n for n, p in self.model.named_parameters() if p.is_meta):
            raise ModelFileError(f"{self.path}: the weights hold no {missing[0]}")

    def _split(self, name: str) -> tuple[str, str]:
        """A tensor's module and its name there; of bitsandbytes' with what tells of a weight."""
        if self._renamed:
            name = name.replace(".block_sparse_moe.", ".mlp.")
        module, is_part, part = name.partition(".weight.")
        if is_part:
            return module, f"weight.{part}"
        module, _, attribute = name.rpartition(".")
        return module, attribute
