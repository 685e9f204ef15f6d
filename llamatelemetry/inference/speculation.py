"""What is drafted for the requests of a batch."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakKeyDictionary

from llamatelemetry.inference.ngrams import NgramIndex
from llamatelemetry.inference.plan import Plan
from llamatelemetry.inference.scheduled_request import ScheduledRequest
from llamatelemetry.inference.scheduler import Scheduler
from llamatelemetry.inference.speculation_config import SpeculationConfig


class Speculation:
    """Drafts tokens for requests that decode, and notes which of them were right.

    Args:
        config: SpeculationConfig.
    """

    def __init__(self, config: SpeculationConfig) -> None:
        self.config = config
        self._indexes: WeakKeyDictionary[ScheduledRequest, NgramIndex] = WeakKeyDictionary()

    def is_due(self, running: Iterable[ScheduledRequest]) -> bool:
        """Whether something may be drafted for the next plan, for which the host has to have seen
        all tokens."""
        return any(one.speculates and _most(one) > 0 for one in running)

    def draft(self, scheduler: Scheduler) -> None:
        """Drafts for the next plan, as much as fits beside a token of everyone at work."""
        spare = scheduler.max_step_tokens - len(scheduler.running)
        for request in scheduler.running:
            # Who computes a prompt, or everything again, draws nothing that could be drafted.
            is_at_work = request.num_left == 1 and not request.num_ahead
            if request.speculates and is_at_work and (most := _most(request)) > 0:
                count = min(most, self.config.num_speculative_tokens, spare)
                request.draft = self._index(request).propose(request.tokens, count)
                spare -= len(request.draft)

    def _index(self, request: ScheduledRequest) -> NgramIndex:
        index = self._indexes.get(request)
        if index is None:
            sizes = self.config.prompt_lookup_min, self.config.prompt_lookup_max
            index = self._indexes[request] = NgramIndex(*sizes)
        return index

    def note(self, plan: Plan, scheduler: Scheduler) -> None:
        """Counts what of a plan's drafts was right, once its tokens were taken; their blocks are
        given back where they were not."""
        for piece in plan.pieces:
            if piece.draft:
                request = piece.request
                request.num_drafted += len(piece.draft)
                request.num_accepted += max(len(request.tokens) - piece.end - 1, 0)
                scheduler.give_back(request)


def _most(request: ScheduledRequest) -> int:
    """Tokens that may be drafted: one is drawn after them, and before the first there is none."""
    drawn = request.num_drawn + request.num_ahead
    return request.max_tokens - drawn - 1 if drawn else 0
