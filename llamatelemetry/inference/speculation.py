"""What is drafted for the requests of a batch."""

from __future__ import annotations

import time
from weakref import WeakKeyDictionary

from llamatelemetry.inference.draft_lengths import DraftLengths
from llamatelemetry.inference.ngrams import NgramIndex
from llamatelemetry.inference.plan import Plan
from llamatelemetry.inference.scheduled_request import ScheduledRequest
from llamatelemetry.inference.scheduler import Scheduler
from llamatelemetry.inference.speculation_config import SpeculationConfig
from llamatelemetry.inference.verify import Verifier
from llamatelemetry.loading.find import context_length_of


class Speculation:
    """Drafts tokens for requests that decode, and notes which of them were right.

    Args:
        config: SpeculationConfig.
        overlap: whether steps are launched before the tokens of the last one are seen, which a
            draft has to wait for.

    Attributes:
        max_context: of the draft model, where there is one.
    """

    def __init__(self, config: SpeculationConfig, overlap: bool = False) -> None:
        self.config, self._overlap = config, overlap
        self.max_context = 0
        if config.draft_model is not None:
            self.max_context = context_length_of(config.draft_model.config)
        self._lengths = DraftLengths() if config.adaptive else None
        self._indexes: WeakKeyDictionary[ScheduledRequest, NgramIndex] = WeakKeyDictionary()
        self._was_due = False
        self._begun: tuple[float, int] = 0.0, 0

    def is_due(self, scheduler: Scheduler) -> bool:
        """Whether something is to be drafted for the next plan, for which the host has to have seen
        all tokens; to be asked once a step."""
        decoding = [one for one in scheduler.running if _decodes(one)]
        self._was_due = any(one.speculates and _most(one) > 0 for one in decoding)
        if self._was_due and self._lengths is not None:
            self._was_due = not self._lengths.rests(len(decoding), _has_prompts(scheduler))
        return self._was_due

    def draft(self, scheduler: Scheduler) -> None:
        """Drafts for the next plan, as much as fits beside a token of everyone at work; half as
        much where prompts are to be computed, which need the budget too."""
        spare = scheduler.max_step_tokens - len(scheduler.running)
        # Who computes a prompt, or everything again, draws nothing that could be drafted.
        decoding = [one for one in scheduler.running if _decodes(one)]
        may_come = scheduler.waiting and len(scheduler.running) < scheduler.max_running
        if may_come or _has_prompts(scheduler):
            spare //= 2
        found: list[tuple[ScheduledRequest, list[int]]] = []
        speaking = [
            one for one in decoding if one.speculates and not one.num_ahead and _most(one) > 0
        ]
        for index, request in enumerate(speaking):
            share = -(-spare // (len(speaking) - index))  # of what those before it have left
            count = min(_most(request), self.config.num_speculative_tokens, share)
            if draft := self._propose(request, count):
                found.append((request, draft))
                spare -= len(draft)
        lengths = [len(draft) for _, draft in found]
        if self._lengths is not None and found:
            drafts = [(request, len(draft)) for request, draft in found]
            lengths = self._lengths.choose(drafts, len(decoding))
        for (request, draft), length in zip(found, lengths, strict=True):
            request.draft = draft[:length]

    def _propose(self, request: ScheduledRequest, count: int) -> list[int]:
        if self.config.draft_model is not None:  # what it drafts comes once there are blocks for it
            return [0] * min(count, self.max_context - len(request.tokens))
        return self._index(request).propose(request.tokens, count)

    def _index(self, request: ScheduledRequest) -> NgramIndex:
        index = self._indexes.get(request)
        if index is None:
            sizes = self.config.prompt_lookup_min, self.config.prompt_lookup_max
            index = self._indexes[request] = NgramIndex(*sizes)
        return index

    def begin(self, num_flights: int) -> None:
        """A step begins, with so many before it whose tokens the host has not seen."""
        self._begun = time.perf_counter(), num_flights

    def note(self, plan: Plan, scheduler: Scheduler, num_flights: int, verifier: Verifier) -> None:
        """A step is over: counts what of its drafts was right; their blocks are given back where
        they were not.

        Args:
            plan: of the step; gets the numbers of its drafted tokens.
            scheduler: whose blocks they are.
            num_flights: as begin's, now.
            verifier: which checked the drafts, if there were any.
        """
        right, is_typical = verifier.right, verifier.was_typical or not plan.has_drafts
        for piece in plan.pieces:
            if piece.draft:
                request, drafted = piece.request, len(piece.draft)
                if request in right:
                    plan.num_drafted += drafted
                    plan.num_accepted += right[request]
                    plan.num_won += max(len(request.tokens) - piece.end - 1, 0)
                    if self._lengths is not None:
                        self._lengths.note_draft(request, drafted, right[request])
                scheduler.give_back(request)
        rows = sum(piece.is_decode for piece in plan.pieces)
        if self._lengths is None or not rows:
            return
        if self._was_due and (right or not plan.has_drafts):
            self._lengths.note_step(rows, plan.num_won, self._overlap)
        began, flights_before = self._begun
        if rows == len(plan.pieces) and flights_before == num_flights and is_typical:
            seconds = time.perf_counter() - began
            self._lengths.note_time(rows, plan.num_drafted, seconds)


def _decodes(request: ScheduledRequest) -> bool:
    """Whether its next piece is one drawn token."""
    is_drawn = request.num_computed >= len(request.prompt)
    return request.num_left == 1 and is_drawn and not request.is_drawn_out


def _has_prompts(scheduler: Scheduler) -> bool:
    """Whether a request at work computes its prompt, or everything again."""
    return not all(
        _decodes(one) or one.is_drawn_out or not one.num_left for one in scheduler.running
    )


def _most(request: ScheduledRequest) -> int:
    """Tokens that may be drafted: one is drawn after them, and before the first there is none."""
    drawn = request.num_drawn + request.num_ahead
    return request.max_tokens - drawn - 1 if drawn else 0
