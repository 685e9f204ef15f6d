"""How the next token is chosen: the parameters of a request, and of a batch as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from llamatelemetry.inference.arguments import integer, real
from llamatelemetry.inference.step import put
from llamatelemetry.ops import sample


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks for; the defaults draw from the model's own distribution.

    Attributes:
        temperature: 0 is greedy; else logits are divided by it
        top_k: keeps the k largest logits and their equals; 0 keeps all
        top_p: keeps the most probable tokens up to this mass; 1 keeps all
        min_p: keeps tokens at least min_p times as probable as the best; 0 keeps all
        seed: same seed, same logits: same text
        repetition_penalty: positive logits of tokens that the prompt or the answer holds are
            divided by it, negative ones multiplied (Keskar et al. 2019, arXiv:1909.05858), before
            all else; 1 changes nothing

    Raises:
        ValueError: naming the argument, the rule and the value

    Example:
        >>> SamplingParams(temperature=0.8, top_p=0.95)
        SamplingParams(temperature=0.8, top_k=0, ..., repetition_penalty=1.0)
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        def check(holds: bool, name: str, rule: str) -> None:
            if not holds:
                value = getattr(self, name)
                raise ValueError(f"SamplingParams: {name} must {rule}, got {value!r}")

        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = real(f"SamplingParams: {name}", getattr(self, name))
            object.__setattr__(self, name, value)
        for name in ("top_k", "seed"):
            object.__setattr__(self, name, integer(f"SamplingParams: {name}", getattr(self, name)))
        finite = 0 <= self.temperature < float("inf")
        check(finite, "temperature", "be finite and at least 0 (0 is greedy)")
        check(self.top_k >= 0, "top_k", "be at least 0 (0 keeps all)")
        check(self.top_k < 2**31, "top_k", "be below 2**31 (0 keeps all)")
        check(0 < self.top_p <= 1, "top_p", "lie in (0, 1] (1 keeps all)")
        check(0 <= self.min_p <= 1, "min_p", "lie in [0, 1] (0 keeps all)")
        check(-(2**63) <= self.seed < 2**63, "seed", "fit in 64 bits")
        penalty = 0 < self.repetition_penalty < float("inf")
        check(penalty, "repetition_penalty", "be positive and finite (1 changes nothing)")


GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class SamplingTensors:
    """The parameters of a batch on its device, a row each: what ``ops.sample`` reads."""

    temperature: Tensor  # [batch] float32
    top_k: Tensor  # [batch] int32
    top_p: Tensor  # [batch] float32
    min_p: Tensor  # [batch] float32
    seed: Tensor  # [batch] int64
    repetition_penalty: Tensor  # [batch] float32

    def sample(
        self,
        logits: Tensor,
        offsets: Tensor,
        seen: Tensor | None = None,
        draw: Callable[..., Tensor] = sample,
    ) -> Tensor:
        """Draws one token a row.

        Args:
            logits: [batch, vocab_size]
            offsets: [batch] int64, another number for each token of a sequence (its position), so
                that every draw is a fresh one
            seen: [batch, vocab_size] bool, where the repetition penalty holds; None is nowhere
            draw: sample of the model's ops

        Returns:
            [batch] int64
        """
        if seen is not None:
            logits, penalty = logits.float(), self.repetition_penalty[:, None]
            penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(seen, penalised, logits)
        return draw(
            logits, self.temperature, self.top_k, self.top_p, self.min_p, self.seed, offsets
        )

    def copy_(self, other: SamplingTensors) -> None:
        """Takes over the values of another batch of as many rows, in place."""
        for column in fields(self):
            getattr(self, column.name).copy_(getattr(other, column.name))


def sampling_tensors(
    params: Sequence[SamplingParams], device: torch.device | str
) -> SamplingTensors:
    """One row for each of params, in order."""

    def column(name: str, dtype: torch.dtype) -> Tensor:
        return put([getattr(p, name) for p in params], dtype, device)

    return SamplingTensors(
        temperature=column("temperature", torch.float32),
        top_k=column("top_k", torch.int32),
        top_p=column("top_p", torch.float32),
        min_p=column("min_p", torch.float32),
        seed=column("seed", torch.int64),
        repetition_penalty=column("repetition_penalty", torch.float32),
    )


def penalises(params: Sequence[SamplingParams]) -> bool:
    """Whether any row's logits depend on the tokens that it has seen."""
    return any(p.repetition_penalty != 1 for p in params)


def mark_seen_(seen: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """Sets seen [batch, vocab_size] bool to the tokens that each row holds; returns it."""
    seen.zero_()
    vocab_size = seen.shape[1]
    for row, tokens in zip(seen, rows, strict=True):
        # A prompt may hold a token that has an embedding and no logit.
        known = [token for token in set(tokens) if token < vocab_size]
        row[torch.tensor(known, dtype=torch.int64, device=seen.device)] = True
    return seen


def refuse_nan(logits: Tensor) -> None:
    """Refuses logits [batch, vocab_size] that no token can be drawn from.

    Raises:
        FloatingPointError: a row holds a NaN, which the op would take for -inf.
    """
    if logits.isnan().any():
        raise nan_error(logits.dtype)


def nan_error(dtype: torch.dtype) -> FloatingPointError:
    """Why no token can be drawn from logits of NaN."""
    return FloatingPointError(
        f"the model's logits are NaN: its weights are damaged, or {str(dtype)[6:]} is "
        "too narrow for its activations (dtype=torch.float32 or bfloat16 may do)"
    )
