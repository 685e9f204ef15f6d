"""How many drafted tokens are worth a place in the next step. No torch.

A step over more tokens takes longer, and brings as many tokens more as drafts are right. Both are
learnt while steps run: for each request how often its drafts are right, for each number of rows
what a step with drafts takes beside one without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from llamatelemetry.inference.scheduled_request import ScheduledRequest

_RATE = 0.1  # how much one step changes an estimate
_FORGETS = 0.95  # what of older samples is left after one more
_START = 0.5  # the share of drafts that is right, before there was any
_RETURN = 0.02  # how fast an estimate goes back there while its drafts are left out
_LEAST_GAIN = 1.02  # of tokens a second, from which on drafts go in
_MEASURES = 4  # steps without drafts that a new number of rows waits for at most, to be timed
_MAX_RATIO = 4.0  # a step that took longer was held up by something else
_FIRST_REST, _LAST_REST = 8, 64  # steps without drafts
_HOPE = 0.15  # tokens of drafts that a row is taken to win a step, after a rest


@dataclass
class _StepTimes:
    """What steps of one number of rows take: seconds without drafts, and the ratio with them as a
    line over the number of drafted tokens, by least squares that forget."""

    plain: float = 0.0
    num_plain: int = 0
    num_waited: int = 0
    # Sums of weight, x, x², y and xy; to begin with two weak samples at a ratio near 1.
    sums: list[float] = field(default_factory=lambda: [2.0, 4.0, 16.0, 2.1, 4.3])

    def note_plain(self, seconds: float) -> None:
        self.num_plain += 1
        if self.num_plain <= 2:  # the first one records or captures
            self.plain = seconds
        else:
            self.plain += _RATE * (min(seconds, 2 * self.plain) - self.plain)

    def note_drafted(self, count: int, seconds: float) -> None:
        if self.num_plain < 2:
            return
        ratio = min(seconds / self.plain, _MAX_RATIO)
        sample = (1.0, count, count * count, ratio, count * ratio)
        self.sums = [_FORGETS * old + new for old, new in zip(self.sums, sample, strict=True)]

    def ratio(self, count: int) -> float:
        """Of a step with so many drafted tokens to one without; 1 for none."""
        weight, x, xx, y, xy = self.sums
        spread = weight * xx - x * x
        slope = max((weight * xy - x * y) / spread, 0.0) if spread > 1e-6 * xx else 0.0
        return max((y - slope * x) / weight + slope * count, 1.0) if count else 1.0


class DraftLengths:
    """Chooses the lengths of drafts, and when none is looked for."""

    def __init__(self) -> None:
        self._right: WeakKeyDictionary[ScheduledRequest, float] = WeakKeyDictionary()
        self._times: dict[int, _StepTimes] = {}
        self._won = _HOPE  # tokens of drafts that a row wins in a step
        self._rest, self._left = _FIRST_REST, 0

    def rests(self, num_rows: int) -> bool:
        """Whether nothing is to be drafted for the next step, of so many rows; to be asked once a
        step."""
        times = self._times_of(num_rows)
        if times.num_plain < 2 and times.num_waited < _MEASURES:
            times.num_waited += 1
            return True
        if self._left == 0:
            return False
        self._left -= 1
        if self._left == 0:
            self._won = _HOPE
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
            times.note_plain(seconds)

    def _times_of(self, num_rows: int) -> _StepTimes:
        times = self._times.get(num_rows)
        if times is None:
            times = self._times[num_rows] = _StepTimes()
            near = min(
                (rows for rows in self._times if rows != num_rows),
                key=lambda rows: abs(rows - num_rows),
                default=None,
            )
            if near is not None:
                times.sums = [value / 4 for value in self._times[near].sums]
        return times
