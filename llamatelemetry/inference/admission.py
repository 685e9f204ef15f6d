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
) -> bool:
    """Whether the blocks would suffice at each time when a request is expected to end.

    Args:
        blocks: BlockManager.
        running: requests that have blocks.
        request: that is to have some too.
        expected_share: of max_tokens, that each is expected to draw.
    """
    rows = [(len(one.tokens), _expected(one, expected_share)) for one in (*running, request)]
    held = blocks.num_blocks - blocks.num_available
    shared = sum(len(one.table) for one in running) - held
    size, most = blocks.page_size, blocks.num_blocks + max(shared, 0)
    if sum(-(-(length + left) // size) for length, left in rows) <= most:
        return True  # even if all of them ended at once
    for steps in {steps for _, steps in rows}:
        if sum(-(-(length + steps) // size) for length, left in rows if left >= steps) > most:
            return False
    return True


def _expected(request: ScheduledRequest, share: float) -> int:
    """Tokens that a request will probably draw yet, at least one."""
    return max(math.ceil(share * request.max_tokens) - request.num_drawn, 1)
