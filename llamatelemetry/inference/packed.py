"""Whether the packed steps serve a model as it is now, and patching it so that they may."""

from __future__ import annotations

import warnings
from typing import Any

from llamatelemetry.inference.kv_pages import check_cache_dtype, check_cache_of, floating_parameter
from llamatelemetry.models.opset import backend_of
from llamatelemetry.models.patching import (
    PatchReport,
    patch,
    unpatch,
    why_not_forward_tokens,
)
from llamatelemetry.models.pieces.watch import SERVED


class NotPackedError(ValueError):
    """The packed steps do not serve a model, or not for so long a text."""


def patch_or_reason(
    model: Any, backend: str | None = None, cache_dtype: Any = None
) -> tuple[PatchReport, str | None]:
    """Patches a model; of one that patch does not know, its attention alone.

    Args:
        backend: as patch's; another than the native one serves the model or is refused, if it was
            asked for.
        cache_dtype: of the steps to come; where it does not serve the model stays as it was.

    Returns:
        The report, and why the packed steps do not serve the model; None where they do.

    Raises:
        ValueError: for a backend or cache_dtype that does not serve the model.
    """
    check_cache_dtype(cache_dtype)
    check_cache_of(model, cache_dtype)
    before = set(vars(model))
    report, reason = _patched(model, backend, backend or backend_of(model))
    try:
        if cache_dtype is not None:  # what only a patched model tells
            check_cache_of(model, cache_dtype, reason or why_not_packed(model))
    except ValueError:
        from llamatelemetry.inference.flash_attn import STATE, disable_flash_attention

        if "_llamatelemetry" not in before:
            unpatch(model)
        if STATE not in before:
            disable_flash_attention(model)
        raise
    return report, reason


def _patched(model: Any, asked: str | None, backend: str) -> tuple[PatchReport, str | None]:
    """What patch_or_reason returns, with the backend that was asked for, and the one to take."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of it is said when it matters
            report = patch(model, backend=backend)
    except ValueError as error:
        if asked not in (None, "native"):
            raise
        if backend != "native":  # our attention would have no kernels there
            return PatchReport(not_packed=str(error)), str(error)
        return PatchReport(not_packed=str(error)), _with_our_attention(model, str(error))
    if backend != "native" and (reason := why_not_packed(model)) is not None:
        unpatch(model)
        if asked is None:
            return PatchReport(not_packed=reason), reason
        raise ValueError(f"backend {backend} does not serve this model: {reason}")
    return report, None


def _with_our_attention(model: Any, reason: str) -> str:
    from llamatelemetry.inference.flash_attn import enable_flash_attention

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            enable_flash_attention(model)
    except Exception as error:  # whatever its attention is made of; it stays as it was
        return f"{reason}; its attention stays as it was: {error}"
    return reason


def why_not_packed(model: Any) -> str | None:
    """Why the packed forward would not be the model's; None if it is.

    A model whose modules were replaced since it was patched is patched anew. One that is not
    patched at all is left to forward_tokens, which says so.
    """
    if (patched := model.__dict__.get("_llamatelemetry")) is None:
        return None
    if any(tensor.is_meta for tensor in model.parameters()):
        return "its weights are offloaded"
    like = floating_parameter(model)
    if like.dtype not in SERVED:
        return f"its dtype must be float32, float16 or bfloat16, got {like.dtype}"
    # Patching anew would call hooks, and hooks may go again.
    is_hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    reason = why_not_forward_tokens(model, renew=not is_hooked)
    patched = model._llamatelemetry
    if patched.decoder is not None:
        return reason
    report: PatchReport = patched.report
    if report.not_packed is not None:
        return report.not_packed
    reasons = {reason: name for name, reason in reversed(report.refused.items())}
    return "; ".join(f"{name}: {reason}" for reason, name in reasons.items()) or None
