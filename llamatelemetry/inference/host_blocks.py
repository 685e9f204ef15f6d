"""Which block of the host's memory holds which tokens of which preempted request. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

from llamatelemetry.inference.block_manager import BlockManager
from llamatelemetry.inference.preemption_costs import PreemptionCosts
from llamatelemetry.inference.scheduled_request import ScheduledRequest

Pairs = list[tuple[int, int]]  # (source, destination) of blocks, for swap_blocks_


@dataclass(frozen=True)
class _Kept:
    num_hidden: int  # leading blocks of which nothing is kept, for nothing is read of them
    blocks: list[int]  # of the host, for the tokens behind those
    num_tokens: int  # whose keys and values they hold


class HostBlocks:
    """Takes the keys and values of requests that give up their blocks, and gives them back.

    Args:
        blocks: BlockManager of the cache.
        num_blocks: blocks of the host's memory.

    Attributes:
        costs: PreemptionCosts, by which they are taken or left to be computed again.
    """

    def __init__(self, blocks: BlockManager, num_blocks: int) -> None:
        self._blocks, self.num_blocks = blocks, num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._kept: dict[Hashable, _Kept] = {}
        self.costs = PreemptionCosts()

    @property
    def num_available(self) -> int:
        return len(self._free)

    def swap_out(self, request: ScheduledRequest) -> Pairs:
        """Room for what of a request's known tokens is computed, before its blocks are freed.

        Returns:
            (cache, host) of each block to be copied before anything is written; none where there is
            nothing to keep, no room for all of it, or where copies take longer than its tokens do:
            then it is to be computed again.
        """
        # One token stays for a forward to run on.
        count = min(request.num_computed, len(request.tokens) - 1)
        hidden = self._blocks.num_hidden(request.name)
        table = self._blocks.table(request.name)[hidden : self._blocks.blocks_for(count)]
        if not table or len(table) > len(self._free):
            return []
        if not self.costs.favours_copies(len(table), count):
            return []
        own = [self._free.pop() for _ in table]
        self._kept[request.name] = _Kept(hidden, own, count)
        return list(zip(table, own, strict=True))

    def swap_in(self, request: ScheduledRequest, num_cached: int) -> tuple[int, Pairs]:
        """What is kept of a request, which has blocks again; they are the host's to give anew.

        Args:
            request: whose blocks were allocated.
            num_cached: leading tokens whose keys and values these hold already.

        Returns:
            How many leading tokens are in the cache once the copies are done, and (host, cache) of
            each of those, to be made before anything is written.
        """
        kept = self._kept.pop(request.name, None)
        if kept is None:
            return num_cached, []
        self._free += reversed(kept.blocks)
        if kept.num_tokens <= num_cached:
            return num_cached, []
        first = max(num_cached // self._blocks.page_size - kept.num_hidden, 0)
        own = self._blocks.table(request.name)[kept.num_hidden :][: len(kept.blocks)]
        self._blocks.commit(request.name, kept.num_tokens, shared=False)
        return kept.num_tokens, list(zip(kept.blocks[first:], own[first:], strict=True))

    def drop(self, request: ScheduledRequest) -> None:
        """Frees what is kept of a request, if anything is."""
        if (kept := self._kept.pop(request.name, None)) is not None:
            self._free += reversed(kept.blocks)

    def check(self) -> None:
        """Raises RuntimeError unless every block is free or one request's."""
        held = Counter([*self._free, *(b for one in self._kept.values() for b in one.blocks)])
        if held != Counter(range(self.num_blocks)):
            raise RuntimeError("HostBlocks: broken invariant: every block is free or one request's")
