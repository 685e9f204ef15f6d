"""Steps of a patched model over its paged cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from llamatelemetry.inference.decode_step import DecodeStep, modules_of
from llamatelemetry.inference.frozen import Frozen, version_of
from llamatelemetry.inference.kv_pages import KvPages
from llamatelemetry.inference.packed import NotPackedError
from llamatelemetry.inference.step import Chunk, keep_until_read, prepare, put, take_ids
from llamatelemetry.inference.step_graphs import StepGraphs
from llamatelemetry.inference.step_parts import part_by_kind
from llamatelemetry.models.forked import note_step
from llamatelemetry.models.patching import forward_tokens, ops_of, rope_state, rope_tables
from llamatelemetry.models.step_input import DecoderState

__all__ = ["PAGE_SIZE", "DecodeStep", "StepRunner"]

PAGE_SIZE = 64  # tokens; a page is one contiguous run for the attention kernels
# Decode steps that are kept, one a number of rows: each holds its activations.
MAX_DECODE_STEPS = 4

_Step = TypeVar("_Step", bound=DecodeStep)


class StepRunner:
    """The steps of one model over its paged cache. Not thread-safe: the caller holds a lock.

    Args:
        max_steps: decode steps that are kept at most, one a number of rows.
        cache_dtype: of keys and values; None is the model's.
        split_size: of every forward's attention, as in StepInput.

    Attributes:
        pages: KvPages, the cache.
        state: DecoderState, the cache and the tables of the rotary embedding.
    """

    def __init__(
        self,
        model: Any,
        page_size: int = PAGE_SIZE,
        max_steps: int = MAX_DECODE_STEPS,
        cache_dtype: torch.dtype | None = None,
        split_size: int = 0,
    ) -> None:
        self.model, self.max_steps, self._split_size = model, max_steps, split_size
        self.pages = KvPages.for_model(model, 0, page_size, cache_dtype)
        self._rope: list[tuple[Tensor, Tensor]] = []
        self.state = DecoderState(caches=self.pages.layers, rope=self._rope)
        self._num_positions = 0
        # by kind, rows and what else a kind is of, the last used last
        self._steps: OrderedDict[tuple[object, ...], DecodeStep] = OrderedDict()
        self._graphs = StepGraphs()
        self._modules, self._frozen = modules_of(model), Frozen(model)
        self._pointers, self._versions = _weights_of(self._modules)
        self._angles = rope_state(model)

    def serves(self, model: Any) -> bool:
        """Whether what is in the cache is of this model as it is now: its layers, dtype, device."""
        return model is self.model and self.pages.fits(model)

    def ready(self, num_positions: int, num_blocks: int, *, keep: bool) -> bool:
        """Grows the tables and the cache to these sizes where they are smaller; drops the decode
        steps where a pointer that they have frozen is no longer right.

        Args:
            num_positions: of the longest sequence, for the rotary embedding.
            num_blocks: of the cache.
            keep: whether the blocks there are hold what somebody needs.

        Returns:
            Whether the model is what it was: else what is cached is of another.

        Raises:
            NotPackedError: for a rotary embedding that has no table for so many positions.
        """
        note_step()
        modules = modules_of(self.model)
        pointers, versions = _weights_of(modules)
        same_weights = versions == self._versions and self._frozen.holds()
        num_positions = max(num_positions, self._num_positions)
        if modules != self._modules:
            self.drop_steps()
            self._modules = modules
        angles = rope_state(self.model)
        if (pointers, num_positions, angles) != (
            self._pointers,
            self._num_positions,
            self._angles,
        ):
            self.drop_steps()
            keep_until_read(table for pair in self._rope for table in pair)
            try:
                self._rope[:] = rope_tables(self.model, num_positions)
            except ValueError as error:
                raise NotPackedError(str(error)) from error
            self._pointers, self._num_positions, self._angles = pointers, num_positions, angles
        if num_blocks > self.pages.num_blocks:
            self.drop_steps()
            self.pages.grow(num_blocks, keep=keep)
        if not same_weights:  # last: after an error the next call is to say so too
            self._frozen, self._versions = Frozen(self.model), versions
        return same_weights

    def _follow_angles(self) -> None:
        """Makes the tables anew where the rotary embedding has changed since ready."""
        angles = rope_state(self.model)
        if angles != self._angles:
            self.drop_steps()
            keep_until_read(table for pair in self._rope for table in pair)
            try:
                self._rope[:] = rope_tables(self.model, self._num_positions)
            except ValueError as error:
                raise RuntimeError(
                    f"forward_tokens: the rotary embedding has changed: {error}; begin again: a "
                    "new generation runs the model's own forward"
                ) from error
            self._angles = angles

    def drop_steps(self) -> None:
        """Forgets the decode steps, as after an error in one."""
        for step in self._steps.values():
            keep_until_read(step.buffers())
        self._steps.clear()

    def prefill(
        self,
        chunks: Sequence[Chunk],
        width: int,
        kept: Sequence[int] | None = None,
        *,
        ahead: Mapping[int, tuple[Tensor, int]] | None = None,
        in_parts: bool = False,
    ) -> Tensor:
        """One forward over packed chunks.

        Args:
            chunks: of different sequences.
            width: of the block table.
            kept: places among the tokens of all chunks; None for each chunk's last.
            ahead: of places the tensor on the device that holds the token there, and where in it.
            in_parts: whether attention is of each kind of chunk apart, as part_by_kind has them.

        Returns:
            Logits [batch, vocab_size] of the tokens that are kept.
        """
        note_step()
        self._follow_angles()
        device = self.pages.device
        slots_of = ops_of(self.model).slot_mapping
        ids, step = prepare(chunks, self.pages.page_size, width, device, slots_of)
        step.split_size = self._split_size
        if ahead:
            take_ids(ids, list(ahead), list(ahead.values()))
        if in_parts:
            part_by_kind(step, chunks)
        if kept is not None:
            step.kept = put(kept, torch.int64, device)
        return forward_tokens(self.model, ids, step, self.state)

    def draw(self, load: Callable[[], _Step], *, looks_first: bool = False) -> tuple[_Step, Tensor]:
        """Runs the decode step that load puts rows in; one that has frozen what is other now is
        dropped first.

        Args:
            load: puts rows in place, again where it is called again.
            looks_first: whether all of a graph too is looked at before it runs, and not, but for
                where its weights lie, while it does: for rows that stand on the device alone, and
                while the GPU is still at work before it.

        Returns:
            The step, and the next token of each of its rows.
        """
        note_step()
        step = load()
        looks_first = looks_first or not step.input_ids.is_cuda
        if step.is_stale if looks_first else step.reads_elsewhere:
            self.drop_steps()
            step = load()
        drawn = step.run()
        # What a graph wrote in vain is written over.
        if not looks_first and step.is_other:
            self.drop_steps()
            step = load()
            drawn = step.run()
        return step, drawn

    def steps(self) -> list[DecodeStep]:
        """Those that are at hand, the last used last."""
        return list(self._steps.values())

    def has(self, step: DecodeStep) -> bool:
        """Whether a step is at hand, and so of the cache as it is."""
        return any(step is one for one in self._steps.values())

    def is_of_the_model(self, step: DecodeStep) -> bool:
        """Whether what a replay has drawn is what the model as it is now draws."""
        return not step.is_stale and rope_state(self.model) == self._angles

    def decode_step(self, batch: int, width: int) -> DecodeStep:
        """The step for so many rows of at most width blocks, a new one where none is at hand."""
        return self.step_of(DecodeStep, batch, width)

    def step_of(self, kind: type[_Step], batch: int, width: int, *more: int) -> _Step:
        """decode_step of another kind, which may be of more numbers than its rows."""
        self._follow_angles()
        key = (kind, batch, *more)
        step = self._steps.get(key)
        if not isinstance(step, kind) or step.width < width:
            dropped = [self._steps.pop(key)] if key in self._steps else []
            while len(self._steps) >= self.max_steps:
                dropped.append(self._steps.popitem(last=False)[1])
            keep_until_read(buffer for one in dropped for buffer in one.buffers())
            sizes = batch, width, self.pages.page_size
            step = kind(self.model, self.state, *sizes, self._graphs, *more)
            step.input.split_size = self._split_size
            self._steps[key] = step
        self._steps.move_to_end(key)
        return step


def _weights_of(modules: Sequence[tuple[Any, int]]) -> tuple[list[int], list[int]]:
    """Where the weights of modules lie, which a recording or a graph has frozen, and how often each
    was changed in place."""
    groups = [group for module, _ in modules for group in (module._parameters, module._buffers)]
    weights = [weight for group in groups for weight in group.values() if weight is not None]
    return [weight.data_ptr() for weight in weights], [version_of(weight) for weight in weights]
