"""The rows of one transformers cache as sequences of the paged cache that a model's runner has."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from llamatelemetry.inference.block_manager import BlockManager
from llamatelemetry.inference.generation import PREFILL_TOKENS
from llamatelemetry.inference.logits_step import LogitsStep
from llamatelemetry.inference.rows import prefill_pieces
from llamatelemetry.inference.runner import StepRunner
from llamatelemetry.inference.shared_pages import Pages, SharedPages
from llamatelemetry.inference.step import Chunk

# Tables and columns grow by so many pages at once, so that few calls need a new recording or graph.
_PAGES_AT_ONCE = 4


class PackedRows:
    """Rows that transformers counts in columns, padding on their left included, and that stand in
    the paged cache without it. All methods but release are for within shared.turn().

    Attributes:
        shared: whose blocks they have.
        columns: how many transformers has seen.
        capacity: how many columns to have blocks for, at least.
        padding: columns of each row that are padding, all at its left; one for each row.
    """

    def __init__(self, shared: SharedPages, capacity: int) -> None:
        self.shared, self.capacity = shared, capacity
        self._end: weakref.finalize | None = None
        self._empty()

    def _empty(self) -> None:
        self.columns = 0
        self.padding: list[int] = []
        self._pages: Pages | None = None
        self._names: list[Hashable] = []
        self._tables: list[list[int]] = []
        self._settled = 0  # columns that the block manager knows of
        self._room = 0  # columns that have blocks which are the rows' own
        self._version: object = object()  # another one whenever the rows change but by a step
        self._places: Tensor | None = None

    @property
    def batch(self) -> int:
        return len(self.padding)

    @property
    def is_stale(self) -> bool:
        """Whether the model has left the device or dtype that these rows have."""
        return self._pages is not None and not self.shared.is_current(self._pages)

    def release(self) -> None:
        """Gives the blocks back; the rows are empty."""
        if self._end is not None:
            self._end()
        self._empty()

    def places(self, new: int, padding: Sequence[int]) -> Tensor:
        """Where each column of each row stands in its sequence once there are so many new ones,
        [batch, columns + new] int64 on the device; negative for padding."""
        total, device = self.columns + new, self.shared.device
        places = self._places
        if places is None or places.shape[1] < total or len(places) != len(padding):
            count = max(total, self.capacity)
            starts = torch.tensor(padding, dtype=torch.int64, device=device)
            places = torch.arange(count, device=device) - starts[:, None]
            if padding is self.padding:
                self._places = places
        return places[:, :total]

    def prefill(self, input_ids: Tensor, padding: Sequence[int], kept: int) -> Tensor:
        """Runs more columns of every row; of rows that begin alike one, whose blocks they share.

        Args:
            input_ids: [batch, new].
            padding: of each row; of the first columns alone can it be other than it is.
            kept: how many columns' logits are asked for, none of them padding.

        Returns:
            [batch, kept, vocab_size]

        Raises:
            ValueError: for a rotary embedding that has no table for so many positions; nothing was
                changed.
        """
        new, rows = input_ids.shape[1], input_ids.tolist()
        is_first = self._pages is None
        places = list(range(len(rows)))  # of each row among those that are run
        if is_first:
            rows = [tuple(row[skip:]) for row, skip in zip(rows, padding, strict=True)]
            unlike = {row: i for i, row in enumerate(dict.fromkeys(rows))}
            places, rows = [unlike[row] for row in rows], list(unlike)
            self._begin([new - len(row) for row in rows])
        try:
            self._make_room(new)
            logits = self._run(rows, kept)
        except BaseException:
            if is_first:
                self.release()
            raise
        self.columns += new
        self._version = object()
        if len(places) > len(rows):
            self.select(places)
            logits = logits[torch.tensor(places, device=logits.device)]
        return logits

    def decode(self, input_ids: Tensor) -> Tensor:
        """Runs one more column of every row.

        Args:
            input_ids: [batch] int64

        Returns:
            [batch, vocab_size], the caller's to keep; the column counts once took_step is called.
        """
        if self.columns + 1 > self._room:
            self._make_room(1)
        step = self._step()
        if step.owner != self._version:
            step.place(self._version, self._tables, self._lengths())
        step.owner = None  # until took_step: whatever stops this run, the next begins anew
        try:
            return step.step(input_ids)
        except BaseException:
            self._runner.drop_steps()
            raise

    def replays(self) -> bool:
        """Whether decode would replay what was recorded or captured before."""
        if self.columns + 1 > self._room:
            return False
        if (step := self._step()).is_stale:
            self._runner.drop_steps()
            return False
        return step.replays

    def took_step(self) -> None:
        """Says that what decode did counts."""
        self.columns += 1
        self._step().owner = self._version

    def truncate(self, columns: int) -> None:
        """Takes the last columns away, so that so many stay."""
        if columns == 0:
            self.release()
            return
        self._settle()
        self.columns = self._settled = columns
        self.padding = [min(count, columns) for count in self.padding]
        self._places = None
        for name, length in zip(self._names, self._lengths(), strict=True):
            self._blocks.truncate(name, length)
        self._room, self._version = 0, object()

    def select(self, indices: Sequence[int]) -> None:
        """The rows become these of them, in this order; blocks are shared until one is written."""
        if self._pages is None or list(indices) == list(range(self.batch)):
            return
        names, end = self._names, self._end
        self._take(self, indices)
        assert end is not None
        end.detach()
        for name in names:
            self._blocks.free(name)

    def fork(self) -> PackedRows:
        """Equal rows, which go their own way."""
        twin = PackedRows(self.shared, self.capacity)
        if self._pages is not None:
            twin._pages = self._pages
            twin._take(self, range(self.batch))
        return twin

    def dense(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, [batch, heads, columns, head_dim]; zeros for padding."""
        if self._pages is None:
            return []
        layers = []
        for pages in self._pages.runner.pages.layers:
            k, v = (x.new_zeros(self.batch, self.columns, *x.shape[2:]) for x in pages)
            for row, (table, length) in enumerate(zip(self._tables, self._lengths(), strict=True)):
                for out, x in zip((k, v), pages, strict=True):
                    count = self._blocks.blocks_for(length)
                    held = x[torch.tensor(table[:count], dtype=torch.int64, device=x.device)]
                    out[row, self.padding[row] :] = held.flatten(0, 1)[:length]
            layers.append((k.transpose(1, 2), v.transpose(1, 2)))
        return layers

    def _begin(self, padding: Sequence[int]) -> None:
        self._pages = self.shared.pages()
        self.padding = list(padding)
        names = self.shared.new_names(len(padding))
        for name in names:
            self._blocks.allocate(name, [])
        self._own(names)

    def _own(self, names: list[Hashable]) -> None:
        """These are the rows' sequences, until the rows are collected."""
        self._names = names
        self._end = weakref.finalize(self, self.shared.end, self._blocks, names)
        self._end.atexit = False

    def _take(self, source: PackedRows, indices: Sequence[int]) -> None:
        """Becomes forks of these rows of source, which may be self."""
        source._settle()
        names = self.shared.new_names(len(indices))
        for name, index in zip(names, indices, strict=True):
            self._blocks.fork(source._names[index], name)
        source._room = 0  # its last blocks are shared now
        self.padding = [source.padding[index] for index in indices]
        self.columns, self._settled = source.columns, source._settled
        self._tables = [self._blocks.table(name) for name in names]
        self._room, self._version, self._places = 0, object(), None
        self._own(names)

    def _lengths(self) -> list[int]:
        return [self.columns - count for count in self.padding]

    def _settle(self) -> None:
        """Tells the block manager of the columns of the steps since."""
        if new := self.columns - self._settled:
            for name, padding in zip(self._names, self.padding, strict=True):
                known = max(self._settled - padding, 0)
                self._blocks.append(name, [0] * (self.columns - padding - known))
            self._settled += new

    def _make_room(self, new: int) -> None:
        """Blocks for new more columns, the rows' own where they will be written."""
        assert self._pages is not None
        self._settle()
        runner, blocks = self._pages.runner, self._pages.blocks
        total = self.columns + new
        if total > self.capacity:  # unforeseen: a while ahead
            self.capacity = total + max(total // 4, _PAGES_AT_ONCE * blocks.page_size)
        lengths, padding = self._lengths(), self.padding
        wanted = [_rounded(self.capacity - count, blocks.page_size) for count in padding]
        more = [
            max(blocks.blocks_for(want) - len(blocks.table(name)), 0) + 1  # a shared one is copied
            for want, name in zip(wanted, self._names, strict=True)
        ]
        self.shared.grow(self._pages, max(wanted), sum(more))
        copied = []
        for name, want, length in zip(self._names, wanted, lengths, strict=True):
            copied += blocks.reserve(name, want - length)
        runner.pages.copy_blocks(copied)
        self._tables = [blocks.table(name) for name in self._names]
        self._room, self._version = self.capacity, object()

    def _step(self) -> LogitsStep:
        return self._runner.step_of(LogitsStep, self.batch, self._width())

    def _width(self) -> int:
        return max(len(table) for table in self._tables)

    def _run(self, rows: Sequence[Sequence[int]], kept: int) -> Tensor:
        """Logits [batch, kept, vocab_size] of the last tokens of each row, which has these more."""
        runner = self._runner
        begins = [self.columns - skip if self.columns else 0 for skip in self.padding]
        found: list[list[Tensor]] = [[] for _ in rows]
        budget = PREFILL_TOKENS[runner.pages.device.type]
        for pieces in prefill_pieces([len(row) for row in rows], budget):
            chunks, places, owners, count = [], [], [], 0
            for row, begin, end in pieces:
                tokens = rows[row]
                chunks.append(Chunk(tokens[begin:end], begins[row] + begin, self._tables[row]))
                asked = range(max(begin, len(tokens) - kept), end)
                places += [count + index - begin for index in asked]
                owners += [row] * len(asked)
                count += end - begin
            # Without any the last tokens' logits are made, and left.
            logits = runner.prefill(chunks, self._width(), places if places else None)
            for i, row in enumerate(owners):
                found[row].append(logits[i])
        return torch.stack([torch.stack(row) for row in found])

    @property
    def _runner(self) -> StepRunner:
        assert self._pages is not None
        return self._pages.runner

    @property
    def _blocks(self) -> BlockManager:
        assert self._pages is not None
        return self._pages.blocks


def _rounded(length: int, page_size: int) -> int:
    """Up to a whole number of pages, so that calls of about equal length share a decode step."""
    size = _PAGES_AT_ONCE * page_size
    return -(-length // size) * size
