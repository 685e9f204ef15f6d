"""Sampling in plain PyTorch: the random generator, the probabilities, the draw."""

from __future__ import annotations

import torch
from torch import Tensor


def philox4x32(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 of Salmon et al. 2011: four 32-bit words of counter, two of key."""
    word = 2**32 - 1
    for i in range(10):
        key0, key1 = (key[0] + i * 0x9E3779B9) & word, (key[1] + i * 0xBB67AE85) & word
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b >> 32 ^ counter[1] ^ key0, b & word, a >> 32 ^ counter[3] ^ key1, a & word]
    return counter


def sampling_probabilities(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """What sample draws one row from; the row holds a finite largest logit, temperature > 0."""
    scores = logits.nan_to_num(nan=-torch.inf, neginf=-torch.inf) / temperature
    if 0 < top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        order = scores.sort(stable=True).indices.flip(0)  # higher ids first among equals
        probs = scores[order].softmax(0)
        removed = probs.cumsum(0) - probs >= max(top_p, 0) * (1 - 2**-23)  # its float32 rounding
        removed[0] = False
        scores = scores.index_fill(0, order[removed], -torch.inf)
    probs = scores.softmax(0)
    probs = probs.masked_fill(probs < min(min_p, 1) * probs.max(), 0)
    return probs / probs.sum()


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    offset: Tensor,
) -> Tensor:
    tokens = []
    for b, row in enumerate(logits):
        numbers = row.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        if not temperature[b] > 0 or not torch.isfinite(numbers.max() / temperature[b]):
            at_largest = (row == numbers.max()).nonzero()
            tokens.append(int(at_largest[0]) if len(at_largest) else 0)
            continue
        words = [int(x[b]) >> shift & 2**32 - 1 for x in (offset, seed) for shift in (0, 32)]
        random = philox4x32([*words[:2], 0, 0], words[2:])
        uniform = (random[1] * 2**32 + random[0]) / 2**64
        probs = sampling_probabilities(
            row, float(temperature[b]), int(top_k[b]), float(top_p[b]), float(min_p[b])
        )
        tokens.append(int((probs.cumsum(0) > uniform).nonzero()[0]))
    return torch.tensor(tokens, device=logits.device)


def apply_token_bitmask_(logits: Tensor, bitmask: Tensor) -> None:
    bits = bitmask[:, :, None] >> torch.arange(32, device=bitmask.device) & 1
    logits.masked_fill_(bits.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)
