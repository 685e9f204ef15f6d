"""What a request does not say: the model's generation_config.json, or else the call's defaults."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from llamatelemetry.inference.sampling import GREEDY, SamplingParams

_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# Fields that would change the text and are not served, with the values at which they do not.
_NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (None, []),
    "diversity_penalty": (None, 0.0),
    "encoder_repetition_penalty": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "guidance_scale": (None, 1.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0.0),
    "sequence_bias": (None,),
    "suppress_tokens": (None, []),
    "top_h": (None,),
    "typical_p": (None, 1.0),
}


class UnsetFloat(float):
    """A default that stands in a signature and that a user's own number is told apart from."""


class UnsetInt(int):
    """As UnsetFloat, for whole numbers."""


def is_set(value: Any) -> bool:
    return not isinstance(value, (UnsetFloat, UnsetInt))


class ModelDefaults:
    """The sampling that a model's generation_config asks for.

    Raises:
        ValueError: a field of another kind or out of range, by name.
    """

    def __init__(self, generation: Mapping[str, Any]) -> None:
        self._given = {k: generation[k] for k in _FIELDS if generation.get(k) is not None}
        self._do_sample = generation.get("do_sample")
        if ignored := [
            name
            for name, neutral in _NOT_SERVED.items()
            if name in generation and generation[name] not in neutral
        ]:
            warnings.warn(
                f"InferenceEngine: generation_config asks for {', '.join(ignored)}, which the "
                "engine does not serve",
                stacklevel=3,
            )
        try:
            self.unasked()
            self.filled()
        except ValueError as error:
            raise ValueError(f"generation_config: {error}") from None

    def unasked(self) -> SamplingParams:
        """For a request that says nothing: greedy unless the config asks to sample, as
        transformers' generate does."""
        penalty = self._given.get("repetition_penalty", 1.0)
        if self._do_sample:
            return SamplingParams(**self._given)
        return SamplingParams(temperature=GREEDY.temperature, repetition_penalty=penalty)

    def filled(self, **asked: Any) -> SamplingParams:
        """For a request with some of its numbers set: the others are the config's, where it has
        them, and else what stands in asked, which is marked as unset."""
        found = {name: value for name, value in asked.items() if is_set(value)}
        found |= {k: v for k, v in self._given.items() if k not in found}
        if self._do_sample is False and not is_set(asked.get("temperature", UnsetFloat(0))):
            found["temperature"] = GREEDY.temperature
        for name in asked.keys() - found.keys():
            value = asked[name]
            found[name] = int(value) if isinstance(value, int) else float(value)
        return SamplingParams(**found)
