"""How many drafted tokens are worth a place in the next step. No torch.

A step over more tokens takes longer, and brings as many tokens more as drafts are right. Both are
learnt while steps run: for each request how often its drafts are right, for each number of rows
what a step with drafts takes beside one without.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from weakref import WeakKeyDictionary

from llamatelemetry.inference.scheduled_request import ScheduledRequest

_RATE = 0.1  # how much one step changes an estimate
_FORGETS = 0.95  # what of older samples is left after one more
_START = 0.5  # the share of drafts that is right, before there was any
_RETURN = 0.02  # how fast an estimate goes back there while its drafts are left out
_FADE = 0.005  # how fast a ratio does while no draft goes in
_LEAST_GAIN = 1.02  # of tokens a second, from which on drafts go in
_TIMED = 5  # steps without drafts whose median is what one takes
_MEASURES = 8  # steps without drafts that a new number of rows waits for at most, to be timed
_REACH = 0.5  # how far from the estimate a ratio counts: something else may hold a step up
# Of drafted tokens a row and ratios near 1: sums of weight, x, x², y and xy, as two weak samples.
_PRIOR = (2.0, 4.0, 16.0, 2.1, 4.3)
_FIRST_REST, _LAST_REST = 8, 64  # steps without drafts
_HOPE = 0.15  # tokens of drafts that a row is taken to win a step, after a rest


@dataclass
class _StepTimes:
    """What steps of one number of rows take: seconds without drafts, and the ratio with them as a
    line over the number of drafted tokens a row, by least squares that forget."""

    num_rows: int

    # A median, for the step after one that was captured finds its tokens there already.
    plain: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMED))
    num_waited: int = 0
    sums: list[float] = field(default_factory=lambda: list(_PRIOR))

    @property
    def is_timed(self) -> bool:
        return len(self.plain) == _TIMED

    def forget(self) -> None:
        """Drafts were left out: the ratio goes back to where it was at first."""
        self.sums = [old + _FADE * (new - old) for old, new in zip(self.sums, _PRIOR, strict=True)]

    def note_drafted(self, count: int, seconds: float) -> None:
        if not self.is_timed:
            return
        near, each = self.ratio(count), count / self.num_rows
        ratio = min(max(seconds / median(self.plain), near - _REACH), near + _REACH)
        sample = (1.0, each, each * each, ratio, each * ratio)
        self.sums = [_FORGETS * old + new for old, new in zip(self.sums, sample, strict=True)]

    def ratio(self, count: int) -> float:
        """Of a step with so many drafted tokens to one without; 1 for none."""
        weight, x, xx, y, xy = self.sums
        spread = weight * xx - x * x
        slope = max((weight * xy - x * y) / spread, 0.0) if spread > 1e-6 * xx else 0.0
        each = count / self.num_rows
        return max((y - slope * x) / weight + slope * each, 1.0) if count else 1.0


class DraftLengths:
    """Chooses the lengths of drafts, and when none is looked for."""

    def __init__(self) -> None:
        self._right: WeakKeyDictionary[ScheduledRequest, float] = WeakKeyDictionary()
        self._times: dict[int, _StepTimes] = {}
        self._won = _HOPE  # tokens of drafts that a row wins in a step
        self._rest, self._left = _FIRST_REST, 0

    def rests(self, num_rows: int, is_mixed: bool = False) -> bool:
        """Whether nothing is to be drafted for the next step; to be asked once a step.

        Args:
            num_rows: requests that decode in it.
            is_mixed: whether it computes prompts too, so that its time tells nothing.
        """
        times = self._times_of(num_rows)
        if not (is_mixed or times.is_timed) and times.num_waited < _MEASURES:
            times.num_waited += 1
            return True
        if self._left == 0:
            return False
        self._left -= 1
        if self._left == 0:
            self._won = max(_HOPE, 1.5 * (times.ratio(1) - 1))
        return True

    def choose(self, drafts: Sequence[tuple[ScheduledRequest, int]], num_rows: int) -> list[int]:
        """How many tokens of each draft go into the next step.

        Args:
            drafts: requests that have one, and how many tokens it has.
            num_rows: requests that decode in the step.
        """
        times = self._times_of(num_rows)
        # A token counts only if all before it are right, so those of one draft come in order.
        chances = sorted(
            (
                (self._right.get(request, _START) ** place, index)
                for index, (request, length) in enumerate(drafts)
                for place in range(1, length + 1)
            ),
            reverse=True,
        )
        best, gain, count = _LEAST_GAIN, 1.0, 0
        for used, (chance, _) in enumerate(chances, 1):
            gain += chance / num_rows
            if gain / times.ratio(used) > best:
                best, count = gain / times.ratio(used), used
        if not count:
            times.forget()
        lengths = [0] * len(drafts)
        for _, index in chances[:count]:
            lengths[index] += 1
        for (request, _), length in zip(drafts, lengths, strict=True):
            if not length:
                right = self._right.get(request, _START)
                self._right[request] = right + _RETURN * (_START - right)
        return lengths

    def note_draft(self, request: ScheduledRequest, drafted: int, accepted: int) -> None:
        """So many of a request's drafted tokens were right; the one after them, if any, was not."""
        tried = accepted + (accepted < drafted)
        right = self._right.get(request, _START)
        for at in range(tried):
            right += _RATE * ((at < accepted) - right)
        self._right[request] = right

    def note_step(self, num_rows: int, accepted: int, threshold: bool) -> None:
        """A step for which drafts were looked for brought so many tokens more.

        Args:
            threshold: whether to look for drafts costs time, as it does where steps overlap.
        """
        self._won += _RATE * (accepted / num_rows - self._won)
        least = self._times_of(num_rows).ratio(1) - 1 if threshold else 0.0
        if self._won < max(least, 1 - 1 / _LEAST_GAIN):
            self._left = self._rest
            self._rest = min(2 * self._rest, _LAST_REST)
        elif self._won > _HOPE:
            self._rest = _FIRST_REST

    def note_time(self, num_rows: int, drafted: int, seconds: float) -> None:
        """What a step took in which all rows decode."""
        times = self._times_of(num_rows)
        if drafted:
            times.note_drafted(drafted, seconds)
        else:
            times.plain.append(seconds)

    def _times_of(self, num_rows: int) -> _StepTimes:
        times = self._times.get(num_rows)
        if times is None:
            times = self._times[num_rows] = _StepTimes(num_rows)
            near = min(
                (rows for rows in self._times if rows != num_rows),
                key=lambda rows: abs(rows - num_rows),
                default=None,
            )
            if near is not None:
                sums = self._times[near].sums
                times.sums = [value * _PRIOR[0] / sums[0] for value in sums]
        return times
