"""What a batch serves: a model, and how texts come to it and end."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from llamatelemetry.inference.engine import InferenceEngine
from llamatelemetry.inference.packed import why_not_packed
from llamatelemetry.inference.sampling import GREEDY, SamplingParams
from llamatelemetry.inference.submission import eos_of
from llamatelemetry.loading.find import LoadedModel
from llamatelemetry.models.patching import ops_of, patch


@dataclass(frozen=True)
class Served:
    """What ContinuousBatching was given as its engine.

    Attributes:
        model: a patched transformers model.
        tokenizer: None where there are token ids alone.
        eos: tokens that end a text.
        unasked: SamplingParams of requests that name none.
    """

    model: Any
    tokenizer: Any
    eos: Collection[int]
    unasked: SamplingParams


def served_by(engine: Any) -> Served:
    """
    Args:
        engine: an InferenceEngine, or a transformers model, patched here.

    Raises:
        ValueError: for neither, and for a model that packed steps do not serve.
    """
    if isinstance(engine, LoadedModel):
        raise ValueError(
            "ContinuousBatching: engine must be InferenceEngine(loaded) or, for token ids alone, "
            "loaded.model, got the LoadedModel itself"
        )
    if not isinstance(engine, (InferenceEngine, nn.Module)):
        raise ValueError(
            "ContinuousBatching: engine must be an InferenceEngine or a transformers model, got "
            f"{type(engine).__name__}"
        )
    if isinstance(engine, InferenceEngine):
        loaded = engine.loaded
        served = Served(loaded.model, engine.tokenizer, loaded.eos_ids, engine.defaults.unasked())
    else:
        served = Served(engine, None, eos_of(engine), GREEDY)
        patch(engine)
    model = served.model
    _check_packed("the model", model)
    return served


def check_draft_model(draft: Any, target: Any) -> None:
    """Patches a model that is to draft for another, with the backend of that.

    Raises:
        ValueError: for a model that packed steps do not serve, or that is patched with another
            backend; for another vocabulary or device.
    """
    if not hasattr(getattr(draft, "config", None), "get_text_config"):
        raise ValueError(
            "SpeculationConfig: draft_model must be a transformers model, got "
            f"{type(draft).__name__}"
        )
    patch(draft, ops=ops_of(target))
    _check_packed("draft_model", draft)
    sizes = [model.config.get_text_config().vocab_size for model in (target, draft)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"SpeculationConfig: draft_model must have the target's vocabulary of {sizes[0]} "
            f"tokens, got {sizes[1]}"
        )
    if draft.device != target.device:
        raise ValueError(
            f"SpeculationConfig: draft_model must be on the target's device {target.device}, got "
            f"{draft.device}"
        )


def _check_packed(name: str, model: Any) -> None:
    if "_llamatelemetry" not in model.__dict__ or why_not_packed(model):
        reason = why_not_packed(model) or "patch does not know it"
        raise ValueError(
            f"ContinuousBatching: {name} must be one that packed steps serve, got "
            f"{type(model).__name__}: {reason}"
        )
