"""The rules that hold between a scheduler's queues and the blocks of its cache. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from llamatelemetry.inference.block_manager import BlockManager
from llamatelemetry.inference.scheduled_request import ScheduledRequest, in_order


def check_limits(
    max_step_tokens: int, max_running: int, expected_share: float, is_fixed: bool
) -> None:
    """Refuses numbers that a Scheduler, whose arguments these are, cannot plan by.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    if max_running < 1:
        raise ValueError(f"Scheduler: max_running must be at least 1, got {max_running}")
    if max_step_tokens < max_running:
        raise ValueError(
            f"Scheduler: max_step_tokens must be at least max_running ({max_running}), so that "
            f"every request at work can decode in a step, got {max_step_tokens}"
        )
    if is_fixed and max_step_tokens == max_running:
        raise ValueError(
            "Scheduler: max_step_tokens must be above max_running where chunks are fixed, got "
            f"{max_step_tokens} for both"
        )
    if not 0 <= expected_share <= 1:
        raise ValueError(f"Scheduler: expected_share must lie in [0, 1], got {expected_share}")


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
            one.num_left or one.is_drawn_out or one.is_beam for one in running
        ),
    }
    return [rule for rule, holds in rules.items() if not holds]
