"""The rules that hold between a scheduler's queues and the blocks of its cache. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from llamatelemetry.inference.block_manager import BlockManager
from llamatelemetry.inference.scheduled_request import ScheduledRequest, in_order


def broken_rules(
    running: Sequence[ScheduledRequest],
    waiting: Sequence[ScheduledRequest],
    blocks: BlockManager,
    max_running: int,
) -> list[str]:
    """The invariants of a Scheduler, whose attributes these are, that do not hold."""
    rules = {
        "both queues are in order": in_order(running) and in_order(waiting),
        "no more requests are at work than may be": len(running) <= max_running,
        "those at work and no others have blocks": (
            set(blocks.sequences()) == {one.name for one in running}
        ),
        "no request is ended": all(one.finish_reason is None for one in (*running, *waiting)),
        "tables are those of the blocks": all(
            one.table == blocks.table(one.name)
            and one.room in (0, len(one.table) * blocks.page_size)
            for one in running
        ),
        "at least one token is left to run on": all(
            one.num_left or one.is_drawn_out for one in running
        ),
    }
    return [rule for rule, holds in rules.items() if not holds]
