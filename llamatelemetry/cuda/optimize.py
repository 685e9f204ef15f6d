"""A model made ready for tensor cores: what to change is decided first, then done and said."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llamatelemetry.cuda import fp16_safety
from llamatelemetry.cuda.scaled_matmul import FLOAT16_MAX
from llamatelemetry.cuda.tensor_core_config import (
    capability_of,
    check_dtype,
    check_tensor_core_support,
    enable_tensor_cores,
    why_unsupported,
)
from llamatelemetry.inference.arguments import instance
from llamatelemetry.loading.model_lists import names_in_float32

_log = logging.getLogger("llamatelemetry")
_CAST = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class OptimizationPlan:
    """What optimize_for_tensor_cores will do to a model.

    Attributes:
        dtype: of weights and activations.
        float32: names of modules whose own parameters and buffers are float32, and why.
        notes: sentences for the notice.
    """

    dtype: torch.dtype
    float32: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def optimize_for_tensor_cores(model: nn.Module, dtype: torch.dtype = torch.float16) -> nn.Module:
    """Makes a model run on tensor cores: on the GPU, in 16 bits, with our fused ops, for inference.

    The statistics of norms stay float32. In float16 a calibration prompt is run first; where values
    come near 65504 the residual stream is kept in float32, and products that would overflow are
    scaled. The log says what was changed.

    Args:
        model: changed in place; a transformers model gets the calibration and the fused ops.
        dtype: float16 or bfloat16; GPUs below compute capability 8.0 get float16 for both.

    Returns:
        model; unchanged, with a warning, where there are no tensor cores.

    Raises:
        RuntimeError: dtype is neither, or weights are too large for it.
        ValueError: model is no module.

    Example:
        >>> layer = torch.nn.Linear(4, 2)
        >>> optimize_for_tensor_cores(layer).weight.dtype  # on a machine without a GPU
        torch.float32
    """
    instance("optimize_for_tensor_cores: model", model, nn.Module, "a module")
    check_dtype("optimize_for_tensor_cores", dtype, (torch.float16, torch.bfloat16))
    device = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.is_cuda:
        device = parameter.device
    if not check_tensor_core_support(device):
        warnings.warn(
            f"optimize_for_tensor_cores: {why_unsupported(device)}; the model stays as it is",
            stacklevel=1,
        )
        return model
    plan = plan_optimization(model, dtype, capability_of(device) or (0, 0))
    enable_tensor_cores(plan.dtype)
    torch.backends.cudnn.benchmark = True
    plan.notes.append("cuDNN picks its convolutions by measuring")
    apply_plan(model, plan, device)
    _log.warning(
        "optimize_for_tensor_cores: %s on %s: %s",
        type(model).__name__,
        device,
        "; ".join(plan.notes),
    )
    return model


def plan_optimization(
    model: nn.Module, dtype: torch.dtype, capability: tuple[int, int]
) -> OptimizationPlan:
    """Decides on a model's dtype and on what stays float32; changes nothing.

    Args:
        model: any module.
        dtype: float16 or bfloat16.
        capability: the GPU's compute capability.

    Returns:
        The plan.
    """
    plan = OptimizationPlan(dtype)
    if dtype == torch.bfloat16 and capability < (8, 0):
        plan.dtype = torch.float16
        plan.notes.append(
            "float16 for bfloat16, which needs compute capability 8.0, got {}.{}".format(
                *capability
            )
        )
    kept = tuple(names_in_float32(model, plan.dtype))
    for name, module in model.named_modules():
        parts = name.split(".")
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            plan.float32[name] = "norm statistics"
        elif any(part in kept for part in parts):
            plan.float32[name] = "the model asks for it"
        elif plan.dtype == torch.float16 and _exceeds_float16(module):
            raise RuntimeError(
                f"optimize_for_tensor_cores: weights must be within float16's 65504, got larger "
                f"ones in {name}; use dtype=torch.bfloat16"
            )
    for why in sorted(set(plan.float32.values())):
        names = [name for name, reason in plan.float32.items() if reason == why]
        plan.notes.append(f"float32 ({why}): {fp16_safety.some_of(names)}")
    return plan


@torch.inference_mode(False)  # parameters made here may be trained, or patched, later
@torch.no_grad()
def apply_plan(
    model: nn.Module,
    plan: OptimizationPlan,
    device: torch.device,
    calibration: Mapping[str, Any] | None = None,
) -> fp16_safety.Fp16Guard:
    """Does what a plan says, and adds what it found to the plan's notes.

    Args:
        model: changed in place.
        plan: plan_optimization's.
        device: where the model is moved; any, so that the CPU can run this too.
        calibration: keyword arguments of the model's forward for the float16 probe, instead of
            fp16_safety.calibration_inputs.

    Returns:
        The float16 guard, empty where none was needed.
    """
    if "_llamatelemetry" in model.__dict__:
        from llamatelemetry.models.patching import unpatch

        unpatch(model)  # the probe looks at the modules that our ops stand for
    model.eval().to(device)
    cast(model, plan)
    plan.notes.insert(0, f"{str(plan.dtype)[6:]}, eval mode")
    guard = fp16_safety.Fp16Guard()
    if plan.dtype == torch.float16:
        guard = _guard_float16(model, plan, calibration)
    if guard.hooks or guard.replaced:
        plan.notes.append("no fused ops, which would need a residual in float16")
    else:
        _patch(model, plan)
    return guard


def cast(model: nn.Module, plan: OptimizationPlan) -> None:
    """Parameters and buffers to the plan's dtypes; the frequencies of rotary embeddings stay."""
    for name, module in model.named_modules():
        dtype = torch.float32 if name in plan.float32 else plan.dtype
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dtype in _CAST:
                parameter.data = parameter.data.to(dtype)
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.dtype in _CAST and "inv_freq" not in key:
                module._buffers[key] = buffer.to(dtype)


def _guard_float16(
    model: nn.Module, plan: OptimizationPlan, calibration: Mapping[str, Any] | None
) -> fp16_safety.Fp16Guard:
    guard = fp16_safety.Fp16Guard()
    try:
        inputs = calibration or fp16_safety.calibration_inputs(model)
        found = fp16_safety.plan_for(fp16_safety.probe(model, inputs))
        guard = fp16_safety.apply(model, found)
        is_finite = not found or fp16_safety.largest_in(model(**inputs)) < float("inf")
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        guard.remove()
        plan.notes.append(f"not guarded against float16 overflow, as the probe failed: {error}")
        return guard
    if found:
        name, value = found.largest
        scaled = fp16_safety.some_of(found.scaled) or "none"
        plan.notes.append(
            f"residual in float32, as {name} reaches {value:.3g} of float16's 65504; products with "
            f"scaled inputs: {scaled}"
        )
    if not is_finite:
        plan.notes.append("still not finite on the calibration prompt; use bfloat16 or float32")
    return guard


def _patch(model: nn.Module, plan: OptimizationPlan) -> None:
    """Our fused ops, where the model's class has a row in the table of families."""
    if not hasattr(model, "config"):
        return
    from llamatelemetry.models.patching import patch

    try:
        report = patch(model)
    except ValueError as error:
        plan.notes.append(f"no fused ops: {error}")
        return
    replaced = ", ".join(f"{count} {name}" for name, count in sorted(report.replaced.items()))
    plan.notes.append(f"fused ops for {replaced or 'nothing'}")
    if report.refused:
        plan.notes.append(f"not replaced: {fp16_safety.some_of(report.refused)}")


def _exceeds_float16(module: nn.Module) -> bool:
    return any(
        p is not None and p.dtype in _CAST and p.numel() and p.abs().max() > FLOAT16_MAX
        for p in module._parameters.values()
    )
