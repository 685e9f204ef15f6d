"""Where drafted tokens come from: what followed the same words before, or a smaller model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from llamatelemetry.inference.acceptance import draw, probabilities
from llamatelemetry.inference.ngrams import NgramIndex
from llamatelemetry.inference.sampling import SamplingParams


class Draft(Protocol):
    """Proposes tokens."""

    def propose(
        self,
        tokens: Sequence[int],
        count: int,
        params: SamplingParams,
        generator: torch.Generator,
    ) -> tuple[list[int], Tensor | None]:
        """At most count tokens after tokens, and the distribution that each was drawn from,
        [count, vocab_size] float64; None where each was certain."""
        ...


class PromptLookup:
    """What followed the last earlier place of the sequence's last few tokens; where that ends, it
    goes on with itself.

    Args:
        max_ngram: so many last tokens are looked for first, then fewer, down to one.
    """

    def __init__(self, max_ngram: int = 3) -> None:
        if max_ngram < 1:
            raise ValueError(f"PromptLookup: max_ngram must be at least 1, got {max_ngram}")
        self.max_ngram = max_ngram
        self._index, self._known = NgramIndex(1, max_ngram), list[int]()

    def propose(
        self,
        tokens: Sequence[int],
        count: int,
        params: SamplingParams,
        generator: torch.Generator,
    ) -> tuple[list[int], None]:
        tokens = list(tokens)
        if tokens[: len(self._known)] != self._known:  # another sequence
            self._index = NgramIndex(1, self.max_ngram)
        self._known = tokens
        return self._index.propose(tokens, count), None


class ModelDraft:
    """A model of the same vocabulary, which costs less than the target."""

    def __init__(self, model: Any) -> None:
        self.model = CachedModel(model)

    def propose(
        self,
        tokens: Sequence[int],
        count: int,
        params: SamplingParams,
        generator: torch.Generator,
    ) -> tuple[list[int], Tensor | None]:
        tokens, rows = list(tokens), []
        length = len(tokens)
        for _ in range(count):
            logits = self.model.logits(tokens, 1).to(generator.device)
            rows.append(probabilities(logits, params))
            tokens.append(draw(rows[-1][0], generator))
        return tokens[length:], torch.cat(rows) if rows else None


class CachedModel:
    """A transformers model whose keys and values of one sequence are kept from call to call."""

    def __init__(self, model: Any) -> None:
        config: Any = getattr(model, "config", None)
        if not hasattr(config, "is_encoder_decoder"):
            raise ValueError(
                "SpeculativeDecoder: models must be transformers models, got "
                f"{type(model).__name__}"
            )
        if getattr(model, "_is_stateful", False) or config.is_encoder_decoder:
            raise ValueError(
                "SpeculativeDecoder: models must be decoders whose cache can be cut back, got "
                f"{type(model).__name__}"
            )
        self.model = model
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._tokens: list[int] = []  # those in the cache
        self._cache: Any = None

    @property
    def num_cached(self) -> int:
        return len(self._tokens)

    @property
    def max_context(self) -> int | None:
        """Tokens that the model can run on; None where its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def logits(self, tokens: Sequence[int], count: int) -> Tensor:
        """Logits [count, vocab_size] at the last count of the tokens. What of them is in the cache
        from the first token on is not computed again; what else is there is cut off."""
        tokens = list(tokens)
        known = next(
            (i for i, (a, b) in enumerate(zip(self._tokens, tokens, strict=False)) if a != b),
            min(len(self._tokens), len(tokens)),
        )
        known = min(known, len(tokens) - count)
        self._keep(known)
        ids = torch.tensor([tokens[known:]], device=self.model.device)
        try:
            options = {"logits_to_keep": count} if self._keeps else {}
            out = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, **options)
        except BaseException:
            self._keep(0)  # some layers may have their new keys, and some may not
            raise
        self._tokens = tokens
        return out.logits[0, -count:]

    def _keep(self, count: int) -> None:
        """The cache holds the first count of its tokens."""
        gone = len(self._tokens) - count
        if count == 0 or self._cache is None:
            # Without a config: layers of sliding windows could not be cut back, so they keep all.
            self._cache = DynamicCache()
        elif gone > 0:
            self._cache.crop(-gone)
        self._tokens = self._tokens[:count]
