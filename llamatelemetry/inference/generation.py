"""Token generation for a patched model: ragged prompts without padding, then one replay a token."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.inference.block_manager import BlockManager
from llamatelemetry.inference.kv_pages import check_cache_dtype, check_cache_of
from llamatelemetry.inference.packed import NotPackedError, why_not_packed
from llamatelemetry.inference.plain_generation import PlainGenerator
from llamatelemetry.inference.row_arguments import check_ends, checked_rows
from llamatelemetry.inference.rows import Rows, prefill_pieces
from llamatelemetry.inference.runner import StepRunner
from llamatelemetry.inference.sampling import (
    SamplingParams,
    mark_seen_,
    penalises,
    refuse_nan,
    sampling_tensors,
)
from llamatelemetry.inference.step import Chunk
from llamatelemetry.inference.stream_order import StreamOrder
from llamatelemetry.loading.find import context_length_of
from llamatelemetry.models.patching import ops_of

# Prompt tokens in one forward, by device: bounds the activations.
PREFILL_TOKENS = {"cpu": 1024, "cuda": 16384}


class TokenGenerator:
    """Generates token ids with a model that ``patch`` has prepared.

    Any number of generations may be open at once, in threads or one between the steps of another:
    each has blocks of its own in one paged cache, which grows to what they need together, and takes
    its turn step by step. One batch's rows stay loaded in the recorded or captured decode step as
    long as no other of as many rows comes between. On a GPU's default stream a step is launched
    before the host has seen the tokens of the one before; where the model has changed under it, it
    is made again, but for a change through .data, which counts from the token after.

    Where the packed steps do not serve the model, or not as it is now, transformers' own forward
    runs, and a warning says why, once for each reason.

    Attributes:
        decode_mode: how the last step was run: "recorded" (CPU), "graph" (CUDA), "eager", or
            "transformers" by its own forward

    Args:
        not_packed: why the packed steps do not serve the model, where that is known.
        cache_dtype: as in StepRunner. Transformers' own forward keeps a cache of the model's
            dtype, and the warning says so.

    Raises:
        ValueError: for a cache_dtype that does not serve the model.
    """

    def __init__(
        self,
        model: Any,
        not_packed: str | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        check_cache_dtype(cache_dtype)
        if cache_dtype is not None:
            check_cache_of(model, cache_dtype, not_packed or why_not_packed(model))
        self.model = model
        self.decode_mode = "eager"
        self.max_context = context_length_of(model.config)
        self._not_packed, self._cache_dtype = not_packed, cache_dtype
        self._plain = PlainGenerator(model)
        self._said: set[str] = set()
        self.runner: StepRunner | None = None
        self.blocks: BlockManager | None = None
        self._order: StreamOrder | None = None
        self._lock = threading.Lock()
        self._turns = itertools.count()
        self._ended: deque[Rows] = deque()  # their blocks are to be freed

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        max_tokens: int,
        eos_token_ids: Collection[int] = (),
        stopped: Collection[int] = (),
    ) -> Iterator[list[int | None]]:
        """Yields one list a step: the new token of each row, None for rows that have ended.

        Args:
            prompts: token ids, one row each, any lengths >= 1
            params: one SamplingParams a row
            max_tokens: tokens generated for a row at most
            eos_token_ids: a row ends with the first of these, which is yielded
            stopped: rows that are to end; the caller may add to it between two steps

        Raises:
            ValueError: at once, for an empty prompt, one that does not fit the context, or a token
                that the model does not have
            RuntimeError: when the model was moved to another device or dtype meanwhile
            FloatingPointError: when the model's logits are NaN
        """
        rows = self.check(prompts, params, max_tokens)
        check_ends(eos_token_ids)
        return self._generate(rows, params, max_tokens, eos_token_ids, stopped)

    @torch.inference_mode()
    def _generate(
        self,
        rows: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        max_tokens: int,
        eos_token_ids: Collection[int],
        stopped: Collection[int],
    ) -> Iterator[list[int | None]]:
        batch, reason = None, self._not_packed
        with self._lock:
            reason = reason or why_not_packed(self.model)
            if reason is None and torch.is_autocast_enabled(self.model.device.type):
                reason = "autocast is on"
            if reason is None:
                try:
                    batch = self._begin(rows, params, max_tokens)
                except NotPackedError as error:
                    reason = str(error)
        if batch is None:
            self._say(str(reason))
            self.decode_mode = "transformers"
            yield from self._plain.generate(rows, params, max_tokens, eos_token_ids, stopped)
            return
        try:
            for count in range(1, max_tokens + 1):
                was_active, tokens = batch.active, batch.tokens
                yield [
                    token if is_active else None
                    for token, is_active in zip(tokens, was_active, strict=True)
                ]
                batch.active = [
                    is_active and token not in eos_token_ids and row not in stopped
                    for row, (token, is_active) in enumerate(zip(tokens, was_active, strict=True))
                ]
                if not any(batch.active) or count == max_tokens:
                    return
                with self._lock:
                    has_changed, goes_on = batch.active != was_active, count + 1 < max_tokens
                    self._step(batch, has_changed=has_changed, goes_on=goes_on)
        finally:
            self._end(batch)

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            cache = "" if self._cache_dtype is None else ", with keys and values in its own dtype"
            warnings.warn(
                f"{type(self.model).__name__} generates by transformers' own forward{cache}: "
                f"{reason}",
                stacklevel=4,
            )

    def check(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], max_tokens: int
    ) -> list[list[int]]:
        """Rows of ids that generate takes.

        Raises:
            ValueError: as generate.
        """
        rows = checked_rows(prompts, params, max_tokens)
        embeddings = self.model.get_input_embeddings()
        vocab_size = getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0]
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
    ) -> Rows:
        """Blocks for the rows, the prompts in the cache, and the first token of each."""
        self._free_ended()
        self._follow()
        runner, blocks = self._with_room(prompts, max_tokens)
        turn, tables = next(self._turns), []
        for row, prompt in enumerate(prompts):
            blocks.allocate((turn, row), prompt, reserve=max_tokens)
            tables.append(blocks.table((turn, row)))
        device = runner.pages.device
        batch = Rows(
            turn=turn,
            runner=runner,
            blocks=blocks,
            width=max(len(table) for table in tables),
            sampling=sampling_tensors(params, device),
            tables=tables,
            lengths=[len(prompt) for prompt in prompts],
            seen=[list(prompt) for prompt in prompts] if penalises(params) else None,
            active=[True] * len(prompts),
        )
        try:
            logits = self._prefill(prompts, batch)
            refuse_nan(logits)
            batch.vocab_size = logits.shape[1]
            offsets = torch.zeros(len(prompts), dtype=torch.int64, device=device)
            seen = None
            if batch.seen is not None:
                seen = mark_seen_(logits.new_empty(logits.shape, dtype=torch.bool), batch.seen)
            draw = ops_of(self.model).sample
            batch.took(batch.sampling.sample(logits, offsets, seen, draw).tolist())
        except BaseException:
            batch.free()
            raise
        return batch

    def _with_room(
        self, prompts: Sequence[Sequence[int]], max_tokens: int
    ) -> tuple[StepRunner, BlockManager]:
        """The runner and its blocks, with room for these rows beside those that are open."""
        runner, blocks = self.runner, self.blocks
        if runner is None or blocks is None or not runner.serves(self.model):
            self.runner = self.blocks = None  # frees the cache first
            runner = StepRunner(self.model, cache_dtype=self._cache_dtype)
            self._order = StreamOrder(runner.pages.device)
            self._order.follow()
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

    def _prefill(self, prompts: Sequence[Sequence[int]], batch: Rows) -> Tensor:
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

    def _step(self, batch: Rows, *, has_changed: bool, goes_on: bool) -> None:
        """One more token of every active row."""
        self._free_ended()
        if batch.runner is not self.runner:
            raise RuntimeError(
                "generate: the model must stay on its device and in its dtype until the last "
                "token, got another; start again"
            )
        self._follow()
        self.decode_mode = batch.step(has_changed=has_changed, goes_on=goes_on)

    def _follow(self) -> None:
        """A run that was launched ahead is over before what another stream is given."""
        if self._order is not None:
            self._order.follow()

    def _end(self, batch: Rows) -> None:
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
            self._ended.popleft().free()
