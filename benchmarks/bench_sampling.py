"""sample against what transformers' generate runs for the same parameters; the mask of a grammar
against masked_fill_ of the mask as bools."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from harness import Case, main
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from llamatelemetry import ops
from llamatelemetry.inference.sampling import SamplingParams, sampling_tensors

REQUESTS = {
    "greedy": SamplingParams(temperature=0),
    "temperature": SamplingParams(temperature=0.8),
    "top_k 40": SamplingParams(top_k=40),
    "top_p 0.9": SamplingParams(top_p=0.9),
    "min_p 0.05": SamplingParams(min_p=0.05),
    "all filters": SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.05),
}


def transformers_sample(params: SamplingParams) -> Callable[..., tuple[Tensor, Tensor]]:
    """Token and filtered scores."""
    warpers = LogitsProcessorList()
    if params.temperature not in (0, 1):
        warpers.append(logits_process.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        warpers.append(logits_process.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(logits_process.TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(logits_process.MinPLogitsWarper(params.min_p))

    def run(logits: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        if params.temperature == 0:
            return logits.argmax(-1), logits
        scores = warpers(None, logits)
        return torch.multinomial(scores.softmax(-1), 1).squeeze(1), scores

    return run


def same_support(ours: Tensor, theirs: tuple[Tensor, Tensor]) -> None:
    """Random numbers differ, so: transformers could have drawn our token."""
    assert theirs[1].gather(1, ours[:, None]).isfinite().all()


def same_token(ours: Tensor, theirs: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(ours, theirs[0])


def token_bitmask(device: torch.device, batch: int, vocab_size: int) -> Case:
    """Half of the tokens forbidden, in words that are mixed."""
    logits = torch.randn(batch, vocab_size, device=device)
    words = torch.randint(-(2**31), 2**31, (batch, -(-vocab_size // 32)), device=device).int()
    bits = (words[:, :, None] >> torch.arange(32, device=device) & 1).flatten(1)[:, :vocab_size]

    def ours(logits: Tensor, words: Tensor, _: Tensor) -> Tensor:
        ops.apply_token_bitmask_(logits, words)
        return logits

    def theirs(logits: Tensor, _: Tensor, forbidden: Tensor) -> Tensor:
        return logits.masked_fill_(forbidden, -torch.inf)

    return Case(
        f"apply_token_bitmask_ {batch}x{vocab_size}",
        inputs=(logits, words, bits == 0),
        ours=ours,
        baselines={"masked_fill_": theirs},
        bytes_moved=words.nbytes + logits.nbytes // 2,
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    shapes = [(1, 49152), (1, 151936)]
    if device.type == "cuda":
        shapes.append((32, 151936))
    for batch, vocab_size in shapes[:1] if quick else shapes:
        # Normal logits of this width have the perplexity of a small model's.
        logits = 2.5 * torch.randn(batch, vocab_size, device=device)
        for name, params in REQUESTS.items():
            tensors = sampling_tensors([params] * batch, device)
            yield Case(
                f"sample {batch}x{vocab_size} {name}",
                inputs=(logits, torch.arange(batch, device=device)),
                ours=tensors.sample,
                baselines={"transformers": transformers_sample(params)},
                bytes_moved=logits.nbytes,
                check=same_token if params.temperature == 0 else same_support,
            )
        yield token_bitmask(device, batch, vocab_size)


if __name__ == "__main__":
    main("sampling", cases)
