"""Token generation for a patched model: ragged prompts without padding, then one replay a token."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.inference.decode_step import PAGE_SIZE, DecodeStep
from llamatelemetry.inference.sampling import SamplingParams
from llamatelemetry.models.patching import forward_tokens
from llamatelemetry.models.step_input import StepInput

# Prompt tokens in one forward, by device: bounds the activations.
PREFILL_TOKENS = {"cpu": 1024, "cuda": 16384}


class TokenGenerator:
    """Generates token ids with a model that ``patch`` has prepared.

    The paged KV cache and the decode step over it, once recorded or captured, serve every later
    batch of as many rows that they are large enough for.

    decode_mode: how the last batch decoded: "recorded" (CPU), "graph" (CUDA) or "eager"
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decode_mode = "eager"
        self.max_context = int(model.config.max_position_embeddings)
        self.step: DecodeStep | None = None
        self._turn = 0

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        max_tokens: int,
        eos_token_ids: Collection[int] = (),
    ) -> Iterator[list[int | None]]:
        """Yields one list a step: the new token of each row, None for rows that have ended.

        prompts:       token ids, one row each, any lengths >= 1
        params:        one SamplingParams a row
        max_tokens:    tokens generated for a row at most
        eos_token_ids: a row ends with the first of these, which is yielded
        Raises:        ValueError for an empty prompt or one that does not fit the context,
                       RuntimeError when a later generate has taken the cache
        """
        longest = self._check(prompts, params, max_tokens)
        step = self._step_for(len(prompts), longest + max_tokens)
        self._turn += 1
        turn = self._turn
        tokens = step.start(
            [len(prompt) for prompt in prompts], params, self._prefill(prompts, step)
        )
        ended = [False] * len(prompts)
        for count in range(1, max_tokens + 1):
            ids = tokens.tolist()
            yield [None if end else token for token, end in zip(ids, ended, strict=True)]
            ended = [end or token in eos_token_ids for token, end in zip(ids, ended, strict=True)]
            if all(ended) or count == max_tokens:
                return
            if turn != self._turn:
                raise RuntimeError("generate: a later generate has taken the cache of this one")
            if any(ended):
                step.hold(ended)
            tokens = step.run()
            self.decode_mode = step.mode

    def _check(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], max_tokens: int
    ) -> int:
        if not prompts or len(prompts) != len(params):
            raise ValueError(
                f"prompts and params must be as many and at least one, got {len(prompts)} and "
                f"{len(params)}"
            )
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        if min(len(prompt) for prompt in prompts) == 0:
            raise ValueError("every prompt must hold at least one token, got an empty one")
        longest = max(len(prompt) for prompt in prompts)
        if longest + max_tokens > self.max_context:
            raise ValueError(
                f"prompt and max_tokens must fit the model's context of {self.max_context} tokens, "
                f"got {longest} + {max_tokens}"
            )
        return longest

    def _step_for(self, batch: int, num_tokens: int) -> DecodeStep:
        """The step at hand where it is large enough, else a new one with a cache of its own."""
        if self.step is None or not self.step.fits(self.model, batch, num_tokens):
            self.step = None  # frees its cache first
            self.step = DecodeStep(self.model, batch, num_tokens)
        return self.step

    def _prefill(self, prompts: Sequence[Sequence[int]], step: DecodeStep) -> Tensor:
        """Runs the prompts through the model in chunks; returns logits [batch, vocab_size]."""
        whole_table, device = step.input.block_table, step.input.block_table.device
        logits: list[Tensor | None] = [None] * len(prompts)
        budget = PREFILL_TOKENS[device.type]
        for pieces in _chunks([len(prompt) for prompt in prompts], budget):
            ids = [token for row, begin, end in pieces for token in prompts[row][begin:end]]
            rows = torch.tensor([row for row, _, _ in pieces])
            lengths = torch.tensor([end - begin for _, begin, end in pieces])
            positions = torch.cat([torch.arange(begin, end) for _, begin, end in pieces])
            first_slot = rows * whole_table.shape[1] * PAGE_SIZE
            ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
            chunk = StepInput(
                positions=positions.to(device),
                slot_mapping=(positions + first_slot.repeat_interleave(lengths)).to(device),
                block_table=whole_table[rows.to(device)],
                cache_seqlens=torch.tensor(
                    [end for _, _, end in pieces], dtype=torch.int32, device=device
                ),
                cu_seqlens_q=ends.to(device, torch.int32),
                max_seqlen_q=int(lengths.max()),
                is_whole=all(begin == 0 for _, begin, _ in pieces),
            )
            last = forward_tokens(self.model, torch.tensor(ids, device=device), chunk, step.state)
            for i, (row, _, end) in enumerate(pieces):
                if end == len(prompts[row]):
                    logits[row] = last[i]
        return torch.stack([row for row in logits if row is not None])


def _chunks(lengths: Sequence[int], budget: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cuts rows of these lengths into (row, begin, end) pieces of at most budget tokens a chunk."""
    pieces: list[tuple[int, int, int]] = []
    room = budget
    for row, length in enumerate(lengths):
        begin = 0
        while begin < length:
            end = min(length, begin + room)
            pieces.append((row, begin, end))
            room -= end - begin
            begin = end
            if room == 0:
                yield pieces
                pieces, room = [], budget
    if pieces:
        yield pieces
