"""How large the cache of a batch is, and of which weights its shared prefixes are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llamatelemetry.inference.block_manager import OutOfBlocks
from llamatelemetry.inference.fingerprint import Fingerprint
from llamatelemetry.inference.model_drafts import ModelDrafts
from llamatelemetry.inference.plan_runner import PlanRunner
from llamatelemetry.inference.scheduled_request import ScheduledRequest
from llamatelemetry.inference.scheduler import Scheduler
from llamatelemetry.loading.find import context_length_of


class CacheRoom:
    """Grows the blocks of a scheduler and the pages of its runner together.

    Args:
        model: a patched transformers model.
        max_rows: requests at work at once.
        num_blocks: of the cache; None grows it to what max_rows requests may need.
        shares: whether prefixes are shared, which are of the weights as they are now.
        scheduler, runner: whose blocks and pages these are.
        drafts: whose pages have the same numbers; None where no model drafts.
    """

    def __init__(
        self,
        model: Any,
        max_rows: int,
        num_blocks: int | None,
        shares: bool,
        scheduler: Scheduler,
        runner: PlanRunner,
        drafts: ModelDrafts | None = None,
    ) -> None:
        self._model, self._max_rows = model, max_rows
        self._fixed, self._shares = num_blocks, shares
        self._scheduler, self._runner, self._drafts = scheduler, runner, drafts
        self._fingerprint: Fingerprint | None = None  # of what the shared prefixes are of

    def make(self, request: ScheduledRequest, everyone: Iterable[ScheduledRequest]) -> bool:
        """Grows the cache for all that is open, else for what was before and this one, else for
        this one alone; the tables for the longest.

        Args:
            request: a new one.
            everyone: all that are open, this one among them.

        Returns:
            Whether there is room for all that is open.
        """
        everyone = list(everyone)
        scheduler = self._scheduler
        known = [*scheduler.running, *scheduler.waiting, *request.draws_for]
        for requests in (everyone, known):
            try:
                self._grow(requests, exact=False)
                return requests is everyone
            except (RuntimeError, ValueError):
                continue  # the memory or the rotary embedding: the least that is needed may do
        try:
            self._grow([request], exact=True)
        except RuntimeError as error:
            raise OutOfBlocks(f"Out of KV cache memory: it cannot grow: {error}") from error
        return False

    def _grow(self, requests: Sequence[ScheduledRequest], *, exact: bool) -> None:
        blocks, runner = self._scheduler.blocks, self._runner
        counts = sorted(blocks.blocks_for(one.most_tokens) for one in requests)
        width = max(runner.width, 1 << max(counts[-1] - 1, 0).bit_length())
        positions = min(width * blocks.page_size, context_length_of(self._model.config))
        if exact:
            positions = max(one.most_tokens for one in requests)
        wanted = self._fixed or max(sum(counts[-self._max_rows :]), blocks.num_blocks)
        is_used = blocks.num_available < blocks.num_blocks or self._shares
        same = runner.runner.ready(positions, wanted, keep=is_used and blocks.num_blocks > 0)
        if self._drafts is not None:
            self._drafts.ready(positions, wanted)
        runner.width = width
        blocks.add_blocks(wanted - blocks.num_blocks)
        if self._shares and not (same and self._fingerprint and self._fingerprint.holds()):
            blocks.forget_prefixes()
            self._fingerprint = Fingerprint(self._model)
