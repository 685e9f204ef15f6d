"""Which drafted tokens are kept, so that all are distributed as the target's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llamatelemetry.inference.sampling import SamplingParams
from llamatelemetry.ops.reference.sampling import sampling_probabilities


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """What ``ops.sample`` draws from, as probabilities; greedy is all on one token.

    Args:
        logits: [num_rows, vocab_size].

    Returns:
        [num_rows, vocab_size] float64.
    """
    numbers = logits.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    rows = []
    for row in numbers:
        largest = row.max()
        if params.temperature > 0 and bool(torch.isfinite(largest / params.temperature)):
            rows.append(
                sampling_probabilities(
                    row, params.temperature, params.top_k, params.top_p, params.min_p
                )
            )
        else:
            first = (row == largest).nonzero()[0]
            rows.append(torch.zeros_like(row).index_fill(0, first, 1.0))
    return torch.stack(rows)


def accept(
    drafted: Sequence[int], draft: Tensor, target: Tensor, generator: torch.Generator
) -> list[int]:
    """Keeps drafted tokens up to the first that is refused, and draws the one after them.

    Token x is kept with probability min(1, p(x) / q(x)), p being the target's and q the draft's
    distribution there; in place of a refused one stands a draw from max(p - q, 0), normalised. So
    the tokens are distributed as p, whatever q is.

    Args:
        drafted: tokens that were drawn from draft's rows, one each.
        draft: [len(drafted), vocab_size], each row sums to 1.
        target: [len(drafted) + 1, vocab_size], likewise, on the same device.
        generator: of the random numbers, on that device.

    Returns:
        1 to len(drafted) + 1 tokens.

    Source:
        Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318
    """
    for i, token in enumerate(drafted):
        p, q = target[i], draft[i]
        uniform = torch.rand((), dtype=p.dtype, device=p.device, generator=generator)
        if not bool(uniform * q[token] < p[token]):
            left = (p - q).clamp(min=0)
            # Nothing is left where p and q differ by rounding alone; then p is as good as q.
            return [*drafted[:i], draw(left if bool(left.sum() > 0) else p, generator)]
    return [*drafted, draw(target[len(drafted)], generator)]


def draw(weights: Tensor, generator: torch.Generator) -> int:
    """A token with the probability of its share of weights, [vocab_size]."""
    return int(torch.multinomial(weights, 1, generator=generator))
