"""Choosing the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.ops._contract import inference_only, register_fake


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    offset: Tensor,
) -> Tensor:
    """Draws one token a row from ``softmax(logits / temperature)`` after top-k, top-p and min-p.

    The filters and their order are those of transformers' generate. The draw inverts the cumulative
    distribution, in order of the ids, at the number that Philox4x32-10 gives for key seed and
    counter offset: a row's token depends on nothing but that row.

    Args:
        logits: [batch, vocab_size], float32, float16 or bfloat16, any row stride
        temperature: [batch] float32; 0 (or below, or NaN) is greedy: the lowest id of the largest
            logit
        top_k: [batch] int32, keeps the k largest and all equal to the k-th; <= 0 keeps all
        top_p: [batch] float32, keeps the fewest most probable tokens that reach this mass, at least
            one, the higher ids among equals; >= 1 keeps all
        min_p: [batch] float32, keeps tokens at least min_p times as probable as the best; <= 0
            keeps all
        seed, offset: [batch] int64; another offset for each token of a sequence

    Returns:
        [batch] int64. A NaN logit counts as -inf; where no finite number is the largest, the row's
        token is the greedy one, and 0 where all are NaN

    Raises:
        RuntimeError: naming the argument, the rule and the value

    Source:
        Salmon et al. 2011 (Philox); Holtzman et al. 2020, arXiv:1904.09751 (top-p); Nguyen et al.
        2024, arXiv:2407.01082 (min-p)
    """
    inference_only("sample", logits=logits)
    return torch.ops.llamatelemetry.sample.default(
        logits, temperature, top_k, top_p, min_p, seed, offset
    )


@register_fake("sample")
def _(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    offset: Tensor,
) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def apply_token_bitmask_(logits: Tensor, bitmask: Tensor) -> None:
    """Sets ``logits[row, token] = -inf`` wherever the token's bit is 0: what a grammar forbids.

    The layout is that of xgrammar: token t is bit ``t % 32`` of word ``t // 32``. Bits past the
    vocabulary mean nothing; a logit whose bit is 1 is not touched.

    Args:
        logits: [batch, vocab_size], float32, float16 or bfloat16, written in place, any row stride
        bitmask: [batch, ceil(vocab_size / 32)] int32, any row stride

    Raises:
        RuntimeError: naming the argument, the rule and the value

    Source:
        Dong et al. 2024, arXiv:2411.15100 (xgrammar)
    """
    inference_only("apply_token_bitmask_", logits=logits)
    torch.ops.llamatelemetry.apply_token_bitmask_.default(logits, bitmask)


@register_fake("apply_token_bitmask_")
def _(logits: Tensor, bitmask: Tensor) -> None:
    return None
