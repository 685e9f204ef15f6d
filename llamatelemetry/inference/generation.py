"""Token generation for a patched model: ragged prompts without padding, then one replay a token."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.inference.recording import Recording, RecordingError
from llamatelemetry.inference.sampling import SamplingParams, sampling_tensors
from llamatelemetry.models.attention import StepState
from llamatelemetry.models.patching import forward_tokens, rope_tables

_log = logging.getLogger("llamatelemetry")

PAGE_SIZE = 64  # tokens; a page is one contiguous run for the attention kernels
PREFILL_TOKENS = 1024  # prompt tokens in one forward: bounds the activations


class TokenGenerator:
    """Generates token ids with a model that ``patch`` has prepared.

    The paged KV cache holds the batch in hand and is reused while it is large enough.

    decode_mode: how the last batch decoded: "recorded" (CPU), "graph" (CUDA) or "eager"
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decode_mode = "eager"
        self.max_context = int(model.config.max_position_embeddings)
        self._parameter = next(p for p in model.parameters() if p.is_floating_point())
        self._caches: list[tuple[Tensor, Tensor]] = []
        self._rope = rope_tables(model, 0)

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
        Raises:        ValueError for an empty prompt or one that does not fit the context
        """
        longest = self._check(prompts, params, max_tokens)
        batch = len(prompts)
        state = self._new_state(batch, longest + max_tokens)
        device = self._parameter.device
        sampler = sampling_tensors(list(params), device)
        offsets = torch.zeros(batch, dtype=torch.int64, device=device)

        tokens = sampler.sample(self._prefill(prompts, state), offsets)
        active = torch.ones(batch, dtype=torch.int64, device=device)
        step: _DecodeStep | None = None
        ended = [False] * batch
        for count in range(1, max_tokens + 1):
            ids = tokens.tolist()
            yield [None if end else token for token, end in zip(ids, ended, strict=True)]
            ended = [end or token in eos_token_ids for token, end in zip(ids, ended, strict=True)]
            if all(ended) or count == max_tokens:
                return
            if step is None:
                offsets.add_(1)
                lengths = [len(prompt) for prompt in prompts]
                _start_decoding(state, lengths)
                step = _DecodeStep(self.model, state, sampler, tokens, offsets, active)
            if any(ended):
                active.copy_(torch.tensor([int(not end) for end in ended]))
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

    def _new_state(self, batch: int, num_tokens: int) -> StepState:
        """A step state over an identity block table: row b owns the b-th run of blocks."""
        config, like = self.model.config, self._parameter
        blocks_per_row = -(-num_tokens // PAGE_SIZE)
        if self._rope[0].shape[0] < blocks_per_row * PAGE_SIZE:
            self._rope = rope_tables(self.model, blocks_per_row * PAGE_SIZE)
        head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        shape = (batch * blocks_per_row, PAGE_SIZE, config.num_key_value_heads, head_dim)
        if not self._caches or self._caches[0][0].shape[0] < shape[0]:
            self._caches = [
                (like.new_empty(shape), like.new_empty(shape))
                for _ in range(config.num_hidden_layers)
            ]
        table = torch.arange(shape[0], dtype=torch.int32, device=like.device)
        empty = torch.empty(0, dtype=torch.int64, device=like.device)
        return StepState(
            positions=empty,
            slot_mapping=empty,
            block_table=table.view(batch, blocks_per_row),
            cache_seqlens=empty.int(),
            cu_seqlens_q=empty.int(),
            max_seqlen_q=0,
            caches=self._caches,
            cos=self._rope[0],
            sin=self._rope[1],
        )

    def _prefill(self, prompts: Sequence[Sequence[int]], state: StepState) -> Tensor:
        """Runs the prompts through the model in chunks; returns logits [batch, vocab_size]."""
        device = state.block_table.device
        whole_table = state.block_table
        logits: list[Tensor | None] = [None] * len(prompts)
        for pieces in _chunks([len(prompt) for prompt in prompts], PREFILL_TOKENS):
            ids = [token for row, begin, end in pieces for token in prompts[row][begin:end]]
            rows = torch.tensor([row for row, _, _ in pieces])
            lengths = torch.tensor([end - begin for _, begin, end in pieces])
            positions = torch.cat([torch.arange(begin, end) for _, begin, end in pieces])
            first_slot = rows * whole_table.shape[1] * PAGE_SIZE
            state.positions = positions.to(device)
            state.slot_mapping = (positions + first_slot.repeat_interleave(lengths)).to(device)
            state.block_table = whole_table[rows.to(device)]
            state.cache_seqlens = torch.tensor(
                [end for _, _, end in pieces], dtype=torch.int32, device=device
            )
            ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
            state.cu_seqlens_q = ends.to(device, torch.int32)
            state.max_seqlen_q = int(lengths.max())
            last = forward_tokens(self.model, torch.tensor(ids, device=device), state)
            for i, (row, _, end) in enumerate(pieces):
                if end == len(prompts[row]):
                    logits[row] = last[i]
        state.block_table = whole_table
        return torch.stack([row for row in logits if row is not None])


class _DecodeStep:
    """One token for every row, recorded or captured at the first run and replayed after it."""

    def __init__(
        self,
        model: Any,
        state: StepState,
        sampler: Any,
        tokens: Tensor,
        offsets: Tensor,
        active: Tensor,
    ) -> None:
        self.mode = "eager"
        self._model, self._state, self._sampler = model, state, sampler
        self._tokens, self._offsets, self._active = tokens.clone(), offsets, active
        self._next = tokens
        self._replay: Any = None

    def run(self) -> Tensor:
        if self._replay is not None:
            self._replay()
        elif self._tokens.is_cuda:
            self._capture()
        else:
            self._record()
        return self._next

    def _forward(self) -> None:
        logits = forward_tokens(self._model, self._tokens, self._state)
        self._next = self._sampler.sample(logits, self._offsets)

    def _advance(self) -> None:
        """The next step's inputs, in place; rows that have ended stay where they are."""
        state = self._state
        self._tokens.copy_(self._next)
        self._offsets.add_(self._active)
        state.positions.add_(self._active)
        state.slot_mapping.add_(self._active)
        state.cache_seqlens.add_(self._active)

    def _record(self) -> None:
        try:
            with Recording() as recording:
                self._forward()
        except RecordingError as error:
            _log.info("decoding eagerly: %s", error)
            self._forward()
            self._replay = self._run_eagerly
        else:
            self.mode = "recorded"
            self._recording = recording
            self._replay = self._replay_recording
        self._advance()

    def _replay_recording(self) -> None:
        self._recording.replay()
        self._advance()

    def _run_eagerly(self) -> None:
        self._forward()
        self._advance()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        tokens = self._next
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._forward()
            self._advance()
        captured = self._next
        captured.copy_(tokens)
        self._advance()
        self.mode = "graph"
        self._replay = graph.replay


def _start_decoding(state: StepState, lengths: Sequence[int]) -> None:
    """Turns the state of a prefill into that of the first decode step, one token a row."""
    device = state.block_table.device
    positions = torch.tensor(lengths, dtype=torch.int64, device=device)
    first_slot = state.block_table[:, 0].long() * PAGE_SIZE
    state.positions = positions
    state.slot_mapping = first_slot + positions
    state.cache_seqlens = (positions + 1).int()
    state.cu_seqlens_q = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device)
    state.max_seqlen_q = 1


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
