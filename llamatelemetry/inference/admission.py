"""Whether requests that are at work leave room for another: a look ahead in blocks. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llamatelemetry.inference.block_manager import BlockManager
from llamatelemetry.inference.scheduled_request import ScheduledRequest


def has_room(
    blocks: BlockManager,
    running: Sequence[ScheduledRequest],
    request: ScheduledRequest,
    expected_share: float,
    window: int | None = None,
) -> bool:
    """Whether the blocks would suffice at each time when a request is expected to end.

    Args:
        blocks: BlockManager.
        running: requests that have blocks.
        request: that is to have some too.
        expected_share: of max_tokens, that each is expected to draw.
        window: as Scheduler has it: with one, no more than is held now or than the window spans.
    """
    size = blocks.page_size
    held = [len(one.table) - blocks.num_hidden(one.name) for one in running]
    shared = sum(held) - (blocks.num_blocks - blocks.num_available)
    limit = blocks.num_blocks + max(shared, 0)
    rows = []
    for one, count in zip((*running, request), (*held, 0), strict=True):
        length = len(one.tokens)
        # A window begins and ends within blocks, and one more is reserved.
        span = math.inf if window is None else blocks.blocks_for(window) + 2
        most = max(count or blocks.blocks_for(length + 1), span)
        rows.append((length, _expected(one, expected_share), most))
    if sum(min(-(-(length + left) // size), most) for length, left, most in rows) <= limit:
        return True  # even if all of them ended at once
    for steps in {steps for _, steps, _ in rows}:
        needed = sum(
            min(-(-(length + steps) // size), most) for length, left, most in rows if left >= steps
        )
        if needed > limit:
            return False
    return True


def _expected(request: ScheduledRequest, share: float) -> int:
    """Tokens that a request will probably draw yet, at least one."""
    return max(math.ceil(share * request.max_tokens) - request.num_drawn, 1)
