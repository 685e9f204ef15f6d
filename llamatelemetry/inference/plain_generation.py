"""Token generation by a transformers model's own forward: what the packed steps do not serve."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.inference.kv_pages import floating_parameter
from llamatelemetry.inference.sampling import (
    SamplingParams,
    mark_seen_,
    penalises,
    refuse_nan,
    sampling_tensors,
)
from llamatelemetry.models.forked import note_step
from llamatelemetry.models.pieces.watch import SERVED

# What a model's forward calls the cache that it returns and takes back.
_CACHES = ("past_key_values", "cache", "cache_params")
# Older releases keep a part of what these cache in the modules, for one row alone.
_STATE_IN_MODULES = ("recurrent_gemma",)


class PlainGenerator:
    """Generates token ids with any causal model of transformers, a row and a token at a time.

    Each row has a cache of its own, of the kind that the model makes; a model without one runs on
    the whole row again. Threads may share it: they take turns, a step each.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._lock = threading.Lock()
        parameters = inspect.signature(model.forward).parameters
        self._cache = next((name for name in _CACHES if name in parameters), None)
        if getattr(model.config, "model_type", None) in _STATE_IN_MODULES:
            self._cache = None
        # A model without a cache to hand over may keep one to itself, of one row.
        self._options: dict[str, Any] = {
            "logits_to_keep": 1,
            "use_cache": self._cache is not None,
        }
        self._options = {k: v for k, v in self._options.items() if k in parameters}
        rope = getattr(model.config, "rope_parameters", None)
        rope = rope if isinstance(rope, dict) else {}
        is_long = rope.get("rope_type") == "longrope"
        # Past so many tokens longrope turns all keys by other angles, those in the cache too.
        self._turning = rope.get("original_max_position_embeddings") if is_long else None

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        max_tokens: int,
        eos_token_ids: Collection[int] = (),
        stopped: Collection[int] = (),
    ) -> Iterator[list[int | None]]:
        """As TokenGenerator.generate, whose checks the arguments have passed."""
        device = _input_device(self.model)
        sampling, seen = sampling_tensors(params, device), None
        rows, caches = [list(prompt) for prompt in prompts], [None] * len(prompts)
        active, logits = [True] * len(rows), None
        for count in range(max_tokens):
            with self._lock:
                for row, is_active in enumerate(active):
                    if is_active:
                        last, caches[row] = self._last_logits(rows[row], caches[row], device)
                        if logits is None:
                            logits = last.new_zeros(len(rows), last.shape[-1])
                        logits[row] = last
                assert logits is not None, "a row is active"
                if logits.dtype not in SERVED:
                    logits = logits.float()  # sample takes no float64
                refuse_nan(logits)
                if penalises(params):
                    seen = logits.new_empty(logits.shape, dtype=torch.bool)
                    mark_seen_(seen, rows)
                offsets = torch.full((len(rows),), count, device=device)
                tokens = sampling.sample(logits, offsets, seen).tolist()
            for row, token in enumerate(tokens):
                if active[row]:
                    rows[row].append(token)
            yield [t if is_active else None for t, is_active in zip(tokens, active, strict=True)]
            active = [
                is_active and token not in eos_token_ids and row not in stopped
                for row, (token, is_active) in enumerate(zip(tokens, active, strict=True))
            ]
            if not any(active):
                return

    def _last_logits(
        self, tokens: Sequence[int], cache: Any, device: torch.device
    ) -> tuple[Tensor, Any]:
        """Logits [vocab_size] behind a row's last token, and the cache with it."""
        note_step()
        options = dict(self._options)
        if self._turning is not None and len(tokens) == self._turning + 1:
            cache = None
        if cache is not None:
            options[str(self._cache)], tokens = cache, tokens[-1:]
        out = self.model(input_ids=torch.tensor([tokens], device=device), **options)
        after = None if self._cache is None else getattr(out, self._cache, None)
        return out.logits[0, -1], after


def _input_device(model: Any) -> torch.device:
    """Where a model takes its ids; one whose weights accelerate offloads says it in its hook."""
    device = floating_parameter(model).device
    if device.type != "meta":
        return device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    found = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((place for place in found if place is not None), "cpu"))
