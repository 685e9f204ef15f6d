"""What one request asks of its logits beyond SamplingParams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from llamatelemetry.inference.arguments import integer, real

MAX_LOGPROBS = 20  # the most probable tokens that are told of at most


class Matcher(Protocol):
    """Where one text stands in a grammar."""

    @property
    def is_complete(self) -> bool: ...

    def fill(self, words: Any, row: int) -> None: ...

    def accept(self, token: int) -> None: ...


class Grammar(Protocol):
    """What a text must match; see ``structured.Structures``."""

    def matcher(self) -> Matcher: ...


@dataclass(frozen=True)
class LogitOptions:
    """Penalties, biases, log-probabilities and the grammar of one request.

    They are applied in this order: the repetition penalty of SamplingParams, frequency and presence
    penalty, logit_bias, tokens that may not end the text yet, the grammar; temperature and filters
    come after.

    Attributes:
        presence_penalty: taken from the logit of each token that the answer holds, in [-2, 2]
        frequency_penalty: the same, once for each time that the answer holds it
        logit_bias: added to the logits of these token ids, each in [-100, 100]
        logprobs: how many of the most probable tokens to tell of beside each token drawn, at most
            20; 0 tells of the one drawn alone, None of none. They are of the model's own
            distribution, before penalties and temperature
        grammar: what the text must match, as a Structures makes it; None is any text

    Raises:
        ValueError: naming the argument, the rule and the value

    Example:
        >>> LogitOptions(presence_penalty=0.5, logprobs=2).needs_logits
        True
        >>> LogitOptions().needs_logits
        False
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            value = real(f"LogitOptions: {name}", getattr(self, name))
            if not -2 <= value <= 2:
                raise ValueError(f"LogitOptions: {name} must lie in [-2, 2], got {value}")
            object.__setattr__(self, name, value)
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(
                "LogitOptions: logit_bias must map token ids to numbers, got "
                f"{self.logit_bias!r:.80}"
            )
        bias = {
            integer("LogitOptions: logit_bias: a token id", token): real(
                f"LogitOptions: logit_bias[{token}]", value
            )
            for token, value in self.logit_bias.items()
        }
        for token, value in bias.items():
            if not -100 <= value <= 100:
                raise ValueError(
                    f"LogitOptions: logit_bias[{token}] must lie in [-100, 100], got {value}"
                )
        object.__setattr__(self, "logit_bias", MappingProxyType(bias))
        if self.logprobs is not None:
            count = integer("LogitOptions: logprobs", self.logprobs)
            if not 0 <= count <= MAX_LOGPROBS:
                raise ValueError(
                    f"LogitOptions: logprobs must lie in [0, {MAX_LOGPROBS}], got {count}"
                )
        if self.grammar is not None and not hasattr(self.grammar, "matcher"):
            raise ValueError(
                f"LogitOptions: grammar must be what Structures made, got {self.grammar!r:.80}"
            )

    @property
    def shapes_logits(self) -> bool:
        """Whether logits are changed."""
        penalties = self.presence_penalty, self.frequency_penalty
        return any(penalties) or bool(self.logit_bias) or self.grammar is not None

    @property
    def needs_logits(self) -> bool:
        """Whether the host has to look at the logits of each step."""
        return self.shapes_logits or self.logprobs is not None


NO_OPTIONS = LogitOptions()
