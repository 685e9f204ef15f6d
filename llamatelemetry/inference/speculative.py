"""Speculative decoding: a draft guesses several tokens, one forward of the target checks them."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.inference.acceptance import accept, probabilities
from llamatelemetry.inference.arguments import instance, integer
from llamatelemetry.inference.drafts import CachedModel, Draft, ModelDraft, PromptLookup
from llamatelemetry.inference.sampling import GREEDY, SamplingParams


@dataclass
class SpeculationStats:
    """Counts over all steps.

    Attributes:
        steps: forwards of the target.
        drafted: tokens that the draft proposed.
        accepted: those of them that were kept.
        generated: tokens that came out.

    Example:
        >>> SpeculationStats(steps=4, drafted=12, accepted=9, generated=13).acceptance_rate
        0.75
    """

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    generated: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Kept tokens of those drafted; 0 of none."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a forward of the target brings; without a draft it would be 1."""
        return self.generated / self.steps if self.steps else 0.0


class SpeculativeDecoder:
    """Several tokens for one forward of the target, distributed as the target's own.

    Greedy tokens are the target's greedy tokens, but for near-ties that the rounding of a forward
    over several tokens decides. Keys and values stay from step to step; where input_ids are others
    than before, only what differs is computed. Threads may share it: they take turns.

    Args:
        target_model: a transformers decoder with a cache that can be cut back, patched or not.
        draft_model: a smaller one of the same vocabulary. None proposes what followed the same
            tokens earlier in the sequence (prompt lookup).
        gamma: tokens drafted for a step at most.
        params: SamplingParams of both models; None is greedy.
        max_ngram: of prompt lookup: tokens that are looked for.

    Attributes:
        stats: SpeculationStats.

    Raises:
        ValueError: gamma below 1, models of different vocabularies, or one whose state cannot be
            cut back.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, num_hidden_layers=1, **sizes))
        >>> decoder = SpeculativeDecoder(model.eval(), gamma=4)
        >>> ids = torch.tensor([[1, 2, 3, 1, 2]])
        >>> longer = decoder.generate_step(ids)
        >>> 1 <= longer.shape[1] - ids.shape[1] <= 5
        True
        >>> decoder.stats.drafted  # 3, 1 and 2 followed 1 and 2 before, and then 3 again
        4
    """

    def __init__(
        self,
        target_model: Any,
        draft_model: Any = None,
        gamma: int = 4,
        params: SamplingParams | None = None,
        *,
        max_ngram: int = 3,
    ) -> None:
        if integer("SpeculativeDecoder: gamma", gamma) < 1:
            raise ValueError(f"SpeculativeDecoder: gamma must be at least 1, got {gamma}")
        self.target_model, self.draft_model, self.gamma = target_model, draft_model, gamma
        self.params = GREEDY if params is None else params
        self.stats = SpeculationStats()
        self._target = CachedModel(target_model)
        self._draft: Draft = PromptLookup(max_ngram)
        if draft_model is not None:
            self._draft = ModelDraft(draft_model)
            sizes = [m.config.get_text_config().vocab_size for m in (target_model, draft_model)]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"SpeculativeDecoder: draft_model must have the target's vocabulary of "
                    f"{sizes[0]} tokens, got {sizes[1]}"
                )
        self._generator = torch.Generator(target_model.device)
        self._lock = threading.Lock()
        self.reseed()

    def reseed(self) -> None:
        """Random numbers begin anew from the seed of params."""
        self._generator.manual_seed(self.params.seed)

    def generate_step(self, input_ids: Tensor) -> Tensor:
        """One forward of the target.

        Args:
            input_ids: [1, seqlen] or [seqlen] integers, at least one.

        Returns:
            input_ids with 1 to gamma + 1 more tokens.

        Raises:
            ValueError: for another shape or dtype, and for a sequence as long as the context.
        """
        tokens = self._checked(input_ids)
        with self._lock:
            new = self._step(tokens, self.gamma)
        return self._extended(input_ids, new)

    def generate(
        self, input_ids: Tensor, max_new_tokens: int = 128, eos_token_ids: Collection[int] = ()
    ) -> Tensor:
        """Steps until max_new_tokens or the first of eos_token_ids, which is kept; from the seed
        on, so that the same call gives the same tokens.

        Args:
            input_ids: as in generate_step.

        Returns:
            input_ids with the new tokens.

        Raises:
            ValueError: as generate_step, and for what does not fit the context.
        """
        tokens = self._checked(input_ids)
        if integer("max_new_tokens", max_new_tokens) < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        limit = self._target.max_context
        if limit is not None and len(tokens) + max_new_tokens > limit:
            raise ValueError(
                f"input_ids and max_new_tokens must fit the target's context of {limit} tokens, "
                f"got {len(tokens)} + {max_new_tokens}"
            )
        new: list[int] = []
        with self._lock:
            self.reseed()
            while len(new) < max_new_tokens:
                # The token after the drafted ones counts too.
                step = self._step(tokens + new, min(self.gamma, max_new_tokens - len(new) - 1))
                end = next((i for i, token in enumerate(step) if token in eos_token_ids), None)
                new += step if end is None else step[: end + 1]
                if end is not None:
                    break
        return self._extended(input_ids, new)

    @torch.inference_mode()
    def _step(self, tokens: list[int], gamma: int) -> list[int]:
        for limit in (self._target.max_context, self._context_of_draft()):
            if limit is not None:
                gamma = min(gamma, limit - len(tokens))
        drafted: list[int] = []
        draft: Tensor | None = None
        if gamma > 0:
            drafted, draft = self._draft.propose(tokens, gamma, self.params, self._generator)
        logits = self._target.logits(tokens + drafted, len(drafted) + 1)
        target = probabilities(logits, self.params)
        if draft is None:
            draft = torch.zeros_like(target[:-1])
            draft[range(len(drafted)), drafted] = 1.0
        new = accept(drafted, draft, target, self._generator)
        stats = self.stats
        stats.steps += 1
        stats.drafted += len(drafted)
        stats.accepted += len(new) - 1
        stats.generated += len(new)
        return new

    def _context_of_draft(self) -> int | None:
        return self._draft.model.max_context if isinstance(self._draft, ModelDraft) else None

    def _checked(self, input_ids: Tensor) -> list[int]:
        instance("input_ids", input_ids, Tensor, "a tensor of integers of shape [1, seqlen]")
        shape = tuple(input_ids.shape)
        if len(shape) == 2 and shape[0] == 1:
            shape = shape[1:]
        integers = (torch.int64, torch.int32)
        if len(shape) != 1 or shape[0] == 0 or input_ids.dtype not in integers:
            raise ValueError(
                "input_ids must be integers of shape [1, seqlen], at least one, got "
                f"{input_ids.dtype} {tuple(input_ids.shape)}"
            )
        limit = self._target.max_context
        if limit is not None and shape[0] >= limit:
            raise ValueError(
                f"input_ids must be fewer than the target's context of {limit} tokens, got "
                f"{shape[0]}"
            )
        return [int(token) for token in input_ids.flatten().tolist()]

    @staticmethod
    def _extended(input_ids: Tensor, new: list[int]) -> Tensor:
        more = input_ids.new_tensor(new)
        return torch.cat([input_ids, more.view(*input_ids.shape[:-1], -1)], -1)
