"""The ops that pieces compute with, as one object: ours, or the same in plain PyTorch."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llamatelemetry._native.coverage import backend_for
from llamatelemetry.extras import not_installed
from llamatelemetry.models.hf_attention import NAME
from llamatelemetry.ops import advance_step_, reference, sample, slot_mapping
from llamatelemetry.quantization.rows import NATIVE_QUANTISING, QuantisedRows, Quantising

BACKENDS = ("native", "triton")


@dataclass(frozen=True)
class OpSet:
    """What a decoder layer is computed with; signatures are those of ``llamatelemetry.ops``.

    Attributes:
        linear: x, weight, bias, residual, activation as ops.linear has them; None leaves linears
            to their own forward.
        gated: name of an activation in transformers' configs -> ``act(gate) * up`` of both.
        activations: likewise ``act(x)``.
        flash_attn_varlen, paged_attention: return the output alone. The latter takes split_size by
            keyword, in sets other than Triton's.
        converts_caches: whether caches may be of another dtype than x. Of 8 bits append_kv_ and
            rope_append_kv_ take scales last, and paged_attention as ``scales=``.
        all_reduce: of what the output and down projections give, where their inputs are split over
            several devices; the identity on one.
        attn_implementation: transformers' name for this set's attention; None leaves the model's.
        group_linear: x, a GroupLinear of one of group_formats, activation as linear has it; None
            leaves such layers to their own forward.
        activates_packed: whether the forward of QuantLinear and GroupLinear applies activations.
        linear_of_any_rows: whether linear is called for many rows too; layers that neither linear,
            group_linear nor scaled_linear takes are refused.
        quantising, scaled_linear: make and multiply rows of a W8A8Linear; else that does both.
        sample, advance_step_, slot_mapping: what the engine calls besides the model.
        name: of the set, where it has one to be pickled by.
    """

    rms_norm: Callable[..., Tensor]
    fused_add_rms_norm_: Callable[..., None]
    layer_norm: Callable[..., Tensor]
    rotary_embedding_: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, bool], None]
    append_kv_: Callable[..., None]
    rope_append_kv_: Callable[..., None]
    flash_attn_varlen: Callable[..., Tensor]
    paged_attention: Callable[..., Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None, Tensor | None, str | None], Tensor] | None
    gated: Mapping[str, Callable[[Tensor], Tensor]]
    activations: Mapping[str, Callable[[Tensor], Tensor]]
    all_reduce: Callable[[Tensor], Tensor]
    attn_implementation: str | None
    group_linear: Callable[[Tensor, Any, str | None], Tensor] | None = None
    group_formats: Collection[str] = ()
    activates_packed: bool = False
    linear_of_any_rows: bool = False
    converts_caches: bool = False
    quantising: Quantising | None = None
    scaled_linear: Callable[[QuantisedRows, Any], Tensor] | None = None
    sample: Callable[..., Tensor] = sample
    advance_step_: Callable[..., None] = advance_step_
    slot_mapping: Callable[..., Tensor] = slot_mapping
    name: str = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> OpSet:
        return self

    def __reduce__(self) -> str | tuple[Any, ...]:
        """By name, as a function is: functions made at run time have no other way."""
        for name in ("NATIVE", "REFERENCE"):
            if self is globals().get(name):
                return name
        if self.name in BACKENDS:
            return opset_of, (self.name,)
        raise pickle.PicklingError(
            "a patched model can be pickled with NATIVE or REFERENCE ops, got others: call "
            "unpatch(model) first"
        )


# Name of an activation in transformers' configs -> that of its op, and in ops.linear.
GATED = {
    "silu": "silu_and_mul",
    "swish": "silu_and_mul",
    "gelu": "gelu_and_mul",
    "gelu_pytorch_tanh": "gelu_tanh_and_mul",
    "gelu_new": "gelu_tanh_and_mul",
}


def _gated(silu: Any, gelu: Any, gelu_tanh: Any) -> dict[str, Callable[[Tensor], Tensor]]:
    by_op = {"silu_and_mul": silu, "gelu_and_mul": gelu, "gelu_tanh_and_mul": gelu_tanh}
    return {name: by_op[op] for name, op in GATED.items()}


ACTIVATIONS = {  # likewise, without a gate
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def opset_of(backend: str) -> OpSet:
    """The ops of a backend.

    Args:
        backend: "native", our C++ and CUDA; or "triton", no library but Triton.

    Raises:
        ValueError: Another name, or a Triton that is not installed.
    """
    if backend == "native":
        return NATIVE
    if backend != "triton":
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    try:
        from llamatelemetry.models.triton_opset import TRITON
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ValueError(not_installed("backend triton", "Triton", "triton")) from error
    return TRITON


def backend_of(model: nn.Module) -> str:
    """What serves a model where no backend was asked for."""
    first = next(model.parameters(), None)
    if first is None:
        return "native"
    backend, reason = backend_for(first.device)
    if reason is not None:
        warnings.warn(f"patch: Triton's kernels serve this model: {reason}", stacklevel=4)
    return backend


def _activations(activation: Callable[..., Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    return {name: partial(activation, kind=kind) for name, kind in ACTIVATIONS.items()}


def _alone(x: Tensor) -> Tensor:
    return x


# Raw ops: a step calls ten a layer, and the wrappers' checks for gradients, which a piece makes
# once a forward, would cost as much again as a small op does.
_ops = torch.ops.llamatelemetry
_flash_attn_varlen = _ops.flash_attn_varlen.default
_paged_attention = _ops.paged_attention.default


def _native_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    *scores: Any,
    sinks: Tensor | None = None,
) -> Tensor:
    # No position biases, and the backend that the op chooses itself.
    if sinks is not None:
        sinks = sinks.float()
    out, _ = _flash_attn_varlen(
        q, k, v, starts, starts, longest, longest, sinks, None, *scores, None
    )
    return out


def _native_paged(
    *args: Any, sinks: Tensor | None = None, scales: Sequence[Tensor] = (), split_size: int = 0
) -> Tensor:
    more: tuple[Any, ...] = () if sinks is None else (None, sinks.float())
    names: dict[str, Any] = dict(zip(("k_scales", "v_scales"), scales, strict=False))
    if split_size:
        names["split_size"] = split_size
    out, _ = _paged_attention(*args, *more, **names)
    return out


NATIVE = OpSet(
    rms_norm=_ops.rms_norm.default,
    fused_add_rms_norm_=_ops.fused_add_rms_norm_.default,
    layer_norm=_ops.layer_norm.default,
    rotary_embedding_=_ops.rotary_embedding_.default,
    append_kv_=_ops.append_kv_.default,
    rope_append_kv_=_ops.rope_append_kv_.default,
    flash_attn_varlen=_native_varlen,
    paged_attention=_native_paged,
    linear=_ops.linear.default,
    gated=_gated(
        _ops.silu_and_mul.default, _ops.gelu_and_mul.default, _ops.gelu_tanh_and_mul.default
    ),
    activations=_activations(_ops.activation.default),
    all_reduce=_alone,
    attn_implementation=NAME,
    activates_packed=True,
    converts_caches=True,
    quantising=NATIVE_QUANTISING,
)


def _in_float64(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A formula of ops/reference.py in float64, rounded once to its first argument's dtype."""

    def computed(x: Tensor, *args: Any, **options: Any) -> Tensor:
        bits = [arg.double() if isinstance(arg, Tensor) else arg for arg in args]
        return formula(x.double(), *bits, **options).to(x.dtype)

    return computed


_exact_rms_norm = _in_float64(reference.rms_norm)


def _exact_fused_add_rms_norm_(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
) -> None:
    residual.add_(x)
    x.copy_(_exact_rms_norm(residual, weight, eps, weight_offset))


def _options(scale: float, causal: bool, left: int, right: int, softcap: float) -> dict[str, Any]:
    return {
        "softmax_scale": scale,
        "causal": causal,
        "window_size": (left, right),
        "softcap": softcap,
    }


def _exact_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    *scores: Any,
    sinks: Tensor | None = None,
) -> Tensor:
    qkv = (q.double(), k.double(), v.double())
    out, _ = reference.flash_attn_varlen(*qkv, starts, starts, sinks=sinks, **_options(*scores))
    return out.to(q.dtype)


def _exact_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    *scores: Any,
    sinks: Tensor | None = None,
    scales: Sequence[Tensor] = (),
    split_size: int = 0,
) -> Tensor:
    del split_size  # nothing is cut here
    tensors = (q.double(), k_cache.double(), v_cache.double())
    where = (block_table, cache_seqlens, cu_seqlens_q)
    options = _options(*scores) | dict(zip(("k_scales", "v_scales"), scales, strict=False))
    out, _ = reference.paged_attention(*tensors, *where, sinks=sinks, **options)
    return out.to(q.dtype)


# Plain PyTorch: where no kernel is to be trusted, and the oracle of a new OpSet.
REFERENCE = OpSet(
    rms_norm=_exact_rms_norm,
    fused_add_rms_norm_=_exact_fused_add_rms_norm_,
    layer_norm=_in_float64(reference.layer_norm),
    rotary_embedding_=reference.rotary_embedding_,
    append_kv_=reference.append_kv_,
    rope_append_kv_=reference.rope_append_kv_,
    flash_attn_varlen=_exact_varlen,
    paged_attention=_exact_paged,
    linear=None,
    gated=_gated(
        _in_float64(reference.silu_and_mul),
        _in_float64(reference.gelu_and_mul),
        _in_float64(reference.gelu_tanh_and_mul),
    ),
    activations=_activations(_in_float64(reference.activation)),
    all_reduce=_alone,
    attn_implementation=None,
    converts_caches=True,
)
