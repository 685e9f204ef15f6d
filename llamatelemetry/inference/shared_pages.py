"""The paged cache of one model's transformers generations, which all of them share."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from llamatelemetry.inference.block_manager import BlockManager
from llamatelemetry.inference.kv_pages import floating_parameter
from llamatelemetry.inference.runner import StepRunner


@dataclass(frozen=True)
class Pages:
    """A cache and its bookkeeping; a model that was moved gets others."""

    runner: StepRunner
    blocks: BlockManager


class SharedPages:
    """Hands out blocks, grows to what the open rows need together, and takes turns.

    Attributes:
        model: whose keys and values they are.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._current: Pages | None = None
        self._lock = threading.Lock()
        self._serials = itertools.count()
        self._ended: deque[tuple[BlockManager, list[Hashable]]] = deque()
        self._stream: Any = None

    @property
    def device(self) -> torch.device:
        return floating_parameter(self.model).device

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The caller's turn: no other thread is inside, and the GPU's work is in its order."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self.free_ended()
            if (device := self.device).type == "cuda":
                with torch.cuda.device(device):
                    stream = torch.cuda.current_stream()
                    if self._stream not in (None, stream):
                        stream.wait_stream(self._stream)
                    self._stream = stream
                    yield
            else:
                yield

    def pages(self) -> Pages:
        """The cache for new rows, of the model as it is."""
        if self._current is None or not self._current.runner.serves(self.model):
            self._current = None  # frees the old one first, where no rows are left in it
            runner = StepRunner(self.model)
            # Tokens are on the device, so that no prefix is known to be another's.
            blocks = BlockManager(0, runner.pages.page_size, share_prefixes=False)
            self._current = Pages(runner, blocks)
        return self._current

    def is_current(self, pages: Pages) -> bool:
        """Whether what is in pages is of the model as it is now."""
        return pages is self._current and pages.runner.serves(self.model)

    def new_names(self, count: int) -> list[Hashable]:
        return [next(self._serials) for _ in range(count)]

    def grow(self, pages: Pages, num_positions: int, num_blocks: int) -> None:
        """Makes room for so many more blocks than are free, and for rows of so many tokens.

        Raises:
            ValueError: for a rotary embedding that has no table for so many positions.
        """
        self.free_ended()
        runner, blocks = pages.runner, pages.blocks
        missing = max(num_blocks - blocks.num_available, 0)
        is_used = blocks.num_sequences > 0
        try:
            runner.ready(num_positions, blocks.num_blocks + missing, keep=is_used)
        except BaseException:
            if not is_used:
                self._current = None  # its old pages may be gone
            raise
        blocks.add_blocks(missing)

    def end(self, blocks: BlockManager, names: list[Hashable]) -> None:
        """Frees sequences now, or in the next turn where one is in progress: this may run inside
        it, for rows end wherever they are collected."""
        self._ended.append((blocks, names))
        if self._lock.acquire(blocking=False):
            try:
                self.free_ended()
            finally:
                self._lock.release()

    def free_ended(self) -> None:
        """Frees what ended meanwhile; for within a turn."""
        while self._ended:
            blocks, names = self._ended.popleft()
            for name in names:
                blocks.free(name)
            names.clear()
