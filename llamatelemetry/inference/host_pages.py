"""The host's memory for swapped blocks: what HostBlocks keeps the books of."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from llamatelemetry.inference.kv_pages import KvPages
from llamatelemetry.inference.preemption_costs import PreemptionCosts
from llamatelemetry.inference.scheduler import Plan
from llamatelemetry.inference.step import put
from llamatelemetry.inference.stopwatch import Stopwatch
from llamatelemetry.ops import swap_blocks_


class HostPages:
    """Pages on the host beside those of a cache, pinned where that is on a GPU; allocated by
    allocate, or else when the first block is swapped.

    Args:
        num_blocks: of the host.

    Attributes:
        costs: PreemptionCosts, told what copies take.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks, self.costs = num_blocks, PreemptionCosts()
        self._running: deque[tuple[int, Stopwatch]] = deque()  # copies that are not over yet
        self._layers: list[tuple[torch.Tensor, ...]] = []

    @property
    def num_bytes(self) -> int:
        return sum(x.nbytes for layer in self._layers for x in layer)

    def make_copies(self, plan: Plan, pages: KvPages) -> None:
        """All copies of blocks that a plan asks for, before its forwards."""
        self.swap(plan, pages)
        if plan.copies:
            with torch.inference_mode():
                pages.copy_blocks(plan.copies)

    def swap(self, plan: Plan, pages: KvPages) -> None:
        """The copies that a plan asks for, out and in: before its other copies, and once."""
        count = len(plan.swaps_out) + len(plan.swaps_in)
        if count:
            with torch.inference_mode():
                self._swap(plan, pages, count)

    def _swap(self, plan: Plan, pages: KvPages, count: int) -> None:
        self.allocate(pages)
        watch = Stopwatch(pages.device)
        for host, cache in zip(self._layers, pages.layers, strict=True):
            self._copy(cache, host, plan.swaps_out, pages.device)
            self._copy(host, cache, plan.swaps_in, pages.device)
        watch.stop()
        self._running.append((count, watch))
        while self._running and self._running[0][1].is_over():
            count, watch = self._running.popleft()
            self.costs.note_copies(count, watch.seconds())

    def _copy(
        self,
        source: tuple[torch.Tensor, ...],
        destination: tuple[torch.Tensor, ...],
        pairs: Sequence[tuple[int, int]],
        device: torch.device,
    ) -> None:
        if pairs:
            on_device = put(pairs, torch.int64, device)
            for i in range(0, len(source), 2):  # keys and values, and their scales
                k_from, v_from, k_to, v_to = (
                    x.unsqueeze(-1) if i else x
                    for x in (*source[i : i + 2], *destination[i : i + 2])
                )
                swap_blocks_(k_from, v_from, k_to, v_to, on_device)

    def allocate(self, pages: KvPages) -> None:
        """All of the host's memory for blocks of these pages, unless it is there.

        Raises:
            RuntimeError: there is too little.
        """
        if self._layers or not self.num_blocks:
            return
        is_pinned = pages.device.type == "cuda"
        self._layers = [
            tuple(
                torch.empty((self.num_blocks, *x.shape[1:]), dtype=x.dtype, pin_memory=is_pinned)
                for x in layer
            )
            for layer in pages.layers
        ]
