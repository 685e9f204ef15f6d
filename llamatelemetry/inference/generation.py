"""Token generation for a patched model: ragged prompts without padding, then one replay a token."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.inference.arguments import integer
from llamatelemetry.inference.block_manager import BlockManager
from llamatelemetry.inference.runner import StepRunner
from llamatelemetry.inference.sampling import SamplingParams, SamplingTensors, sampling_tensors
from llamatelemetry.inference.step import Chunk

# Prompt tokens in one forward, by device: bounds the activations.
PREFILL_TOKENS = {"cpu": 1024, "cuda": 16384}


@dataclass
class _Batch:
    """The rows of one generate: what the host knows of them between two steps."""

    turn: int
    runner: StepRunner
    blocks: BlockManager
    width: int  # blocks of the longest row
    sampling: SamplingTensors
    tables: list[list[int]]  # blocks of each row
    lengths: list[int]  # tokens of each row, the last included, whose keys are not in the cache
    tokens: list[int] = field(default_factory=list)  # the last of each row
    active: list[bool] = field(default_factory=list)
    count: int = 0  # tokens drawn for each active row

    def took(self, tokens: list[int]) -> None:
        """Notes what a step has drawn."""
        self.tokens = tokens
        self.count += 1
        self.lengths = [
            length + is_active for length, is_active in zip(self.lengths, self.active, strict=True)
        ]


class TokenGenerator:
    """Generates token ids with a model that ``patch`` has prepared.

    Any number of generations may be open at once, in threads or one between the steps of another:
    each has blocks of its own in one paged cache, which grows to what they need together, and takes
    its turn step by step. One batch's rows stay loaded in the recorded or captured decode step as
    long as no other of as many rows comes between.

    Attributes:
        decode_mode: how the last step was run: "recorded" (CPU), "graph" (CUDA) or "eager"
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decode_mode = "eager"
        self.max_context = int(model.config.max_position_embeddings)
        self.runner: StepRunner | None = None
        self.blocks: BlockManager | None = None
        self._lock = threading.Lock()
        self._turns = itertools.count()
        self._ended: deque[_Batch] = deque()  # their blocks are to be freed

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        max_tokens: int,
        eos_token_ids: Collection[int] = (),
    ) -> Iterator[list[int | None]]:
        """Yields one list a step: the new token of each row, None for rows that have ended.

        Args:
            prompts: token ids, one row each, any lengths >= 1
            params: one SamplingParams a row
            max_tokens: tokens generated for a row at most
            eos_token_ids: a row ends with the first of these, which is yielded

        Raises:
            ValueError: for an empty prompt, one that does not fit the context, or a token that the
                model does not have
            RuntimeError: when the model was moved to another device or dtype meanwhile
        """
        rows = self._checked(prompts, params, max_tokens)
        with self._lock:
            batch = self._begin(rows, params, max_tokens)
        try:
            for count in range(1, max_tokens + 1):
                was_active, tokens = batch.active, batch.tokens
                yield [
                    token if is_active else None
                    for token, is_active in zip(tokens, was_active, strict=True)
                ]
                batch.active = [
                    is_active and token not in eos_token_ids
                    for token, is_active in zip(tokens, was_active, strict=True)
                ]
                if not any(batch.active) or count == max_tokens:
                    return
                with self._lock:
                    self._step(batch, has_changed=batch.active != was_active)
        finally:
            self._end(batch)

    def _checked(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], max_tokens: int
    ) -> list[list[int]]:
        if not prompts or len(prompts) != len(params):
            raise ValueError(
                f"prompts and params must be as many and at least one, got {len(prompts)} and "
                f"{len(params)}"
            )
        if integer("max_tokens", max_tokens) < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        rows = [[integer("prompt: a token id", token) for token in row] for row in prompts]
        if not all(rows):
            raise ValueError("every prompt must hold at least one token, got an empty one")
        vocab_size = self.model.get_input_embeddings().num_embeddings
        for token in {end for row in rows for end in (min(row), max(row))}:
            if not 0 <= token < vocab_size:
                raise ValueError(f"prompt: token ids must lie in [0, {vocab_size}), got {token}")
        longest = max(len(row) for row in rows)
        if longest + max_tokens > self.max_context:
            raise ValueError(
                f"prompt and max_tokens must fit the model's context of {self.max_context} tokens, "
                f"got {longest} + {max_tokens}"
            )
        return rows

    def _begin(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], max_tokens: int
    ) -> _Batch:
        """Blocks for the rows, the prompts in the cache, and the first token of each."""
        self._free_ended()
        runner, blocks = self._with_room(prompts, max_tokens)
        turn, tables = next(self._turns), []
        for row, prompt in enumerate(prompts):
            blocks.allocate((turn, row), prompt, reserve=max_tokens)
            tables.append(blocks.table((turn, row)))
        device = runner.pages.device
        batch = _Batch(
            turn=turn,
            runner=runner,
            blocks=blocks,
            width=max(len(table) for table in tables),
            sampling=sampling_tensors(params, device),
            tables=tables,
            lengths=[len(prompt) for prompt in prompts],
            active=[True] * len(prompts),
        )
        try:
            logits = self._prefill(prompts, batch)
            offsets = torch.zeros(len(prompts), dtype=torch.int64, device=device)
            batch.took(batch.sampling.sample(logits, offsets).tolist())
        except BaseException:
            self._free(batch)
            raise
        return batch

    def _with_room(
        self, prompts: Sequence[Sequence[int]], max_tokens: int
    ) -> tuple[StepRunner, BlockManager]:
        """The runner and its blocks, with room for these rows beside those that are open."""
        runner, blocks = self.runner, self.blocks
        if runner is None or blocks is None or not runner.serves(self.model):
            self.runner = self.blocks = None  # frees the cache first
            runner = StepRunner(self.model)
            # A prompt that begins in the cache runs through other kernels than a whole one, so its
            # tokens would not be those of the same prompt alone: prefixes are not shared.
            blocks = BlockManager(0, runner.pages.page_size, share_prefixes=False)
        needed = [blocks.blocks_for(len(prompt) + max_tokens) for prompt in prompts]
        missing = max(sum(needed) - blocks.num_available, 0)
        is_used = blocks.num_sequences > 0
        try:
            positions = max(needed) * blocks.page_size
            runner.ready(positions, blocks.num_blocks + missing, keep=is_used)
        except BaseException:
            if not is_used:
                self.runner = self.blocks = None  # its old pages may be gone
            raise
        blocks.add_blocks(missing)
        self.runner, self.blocks = runner, blocks
        return runner, blocks

    def _prefill(self, prompts: Sequence[Sequence[int]], batch: _Batch) -> Tensor:
        """Runs the prompts through the model in chunks; returns logits [batch, vocab_size]."""
        logits: list[Tensor | None] = [None] * len(prompts)
        budget = PREFILL_TOKENS[batch.runner.pages.device.type]
        for pieces in prefill_pieces([len(prompt) for prompt in prompts], budget):
            chunks = [
                Chunk(prompts[row][begin:end], begin, batch.tables[row])
                for row, begin, end in pieces
            ]
            last = batch.runner.prefill(chunks, batch.width)
            for i, (row, _, end) in enumerate(pieces):
                if end == len(prompts[row]):
                    logits[row] = last[i]
        return torch.stack([row for row in logits if row is not None])

    def _step(self, batch: _Batch, *, has_changed: bool) -> None:
        """One more token of every active row."""
        self._free_ended()
        if batch.runner is not self.runner:
            raise RuntimeError(
                "generate: the model must stay on its device and in its dtype until the last "
                "token, got another; start again"
            )
        step = batch.runner.decode_step(len(batch.tables), batch.width)
        if step.owner != batch.turn:
            rows = zip(batch.tokens, batch.lengths, batch.tables, strict=True)
            chunks = [Chunk([token], length - 1, table) for token, length, table in rows]
            counts = [batch.count] * len(chunks)
            step.load(batch.turn, chunks, batch.sampling, counts, batch.active)
        elif has_changed:
            step.hold(batch.active)
        batch.took(step.run().tolist())
        self.decode_mode = step.mode

    def _end(self, batch: _Batch) -> None:
        """Frees a batch's blocks now, or when the step in progress is over: this may run inside it,
        for an abandoned generation ends wherever it is collected."""
        self._ended.append(batch)
        if self._lock.acquire(blocking=False):
            try:
                self._free_ended()
            finally:
                self._lock.release()

    def _free_ended(self) -> None:
        while self._ended:
            self._free(self._ended.popleft())

    def _free(self, batch: _Batch) -> None:
        for row in reversed(range(len(batch.tables))):
            batch.blocks.free((batch.turn, row))


def prefill_pieces(lengths: Sequence[int], budget: int) -> Iterator[list[tuple[int, int, int]]]:
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
