"""How a batch is to speculate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llamatelemetry.inference.arguments import at_least

MAX_DRAFT = 15  # tokens; a draft and the token before it are few queries to the attention kernels
MAX_NGRAM = 32  # tokens; each token of a text is kept in an n-gram of every length


@dataclass(frozen=True)
class SpeculationConfig:
    """How ContinuousBatching drafts tokens that one forward then checks.

    Attributes:
        num_speculative_tokens: drafted for a request and a step at most, up to 15
        prompt_lookup_max, prompt_lookup_min: so many last tokens, up to 32, are looked for earlier
            in the request's own text, the longest first; what followed them there is the draft
        adaptive: whether drafts become shorter, or are left out for a while, where they win less
            time than they cost; False drafts whatever there is to draft
        draft_model: a smaller transformers model of the target's vocabulary, patched by
            ContinuousBatching, which drafts in the place of prompt lookup; None is prompt lookup

    Raises:
        ValueError: naming the argument, the rule and the value

    Example:
        >>> SpeculationConfig(num_speculative_tokens=5).prompt_lookup_max
        4
    """

    num_speculative_tokens: int = 4
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2
    adaptive: bool = True
    draft_model: Any = None

    def __post_init__(self) -> None:
        for name in ("num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max"):
            at_least(f"SpeculationConfig: {name}", getattr(self, name), 1)
        if self.num_speculative_tokens > MAX_DRAFT:
            raise ValueError(
                f"SpeculationConfig: num_speculative_tokens must be at most {MAX_DRAFT}, got "
                f"{self.num_speculative_tokens}"
            )
        if self.prompt_lookup_max < self.prompt_lookup_min:
            raise ValueError(
                "SpeculationConfig: prompt_lookup_max must be at least prompt_lookup_min "
                f"({self.prompt_lookup_min}), got {self.prompt_lookup_max}"
            )
        if self.prompt_lookup_max > MAX_NGRAM:
            raise ValueError(
                f"SpeculationConfig: prompt_lookup_max must be at most {MAX_NGRAM}, got "
                f"{self.prompt_lookup_max}"
            )
        if not isinstance(self.adaptive, bool):
            raise ValueError(
                f"SpeculationConfig: adaptive must be True or False, got {self.adaptive!r}"
            )


def checked_speculation(config: Any) -> SpeculationConfig | None:
    """Refuses what is neither a SpeculationConfig nor None.

    Raises:
        ValueError: with the value.
    """
    if config is not None and not isinstance(config, SpeculationConfig):
        raise ValueError(
            f"ContinuousBatching: speculation must be a SpeculationConfig or None, got {config!r}"
        )
    return config
