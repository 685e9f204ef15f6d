"""Beam search over one prompt, from the best tokens after each beam. No torch.

The rules are those of transformers' generate(num_beams=n, do_sample=False).
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from llamatelemetry.inference.arguments import at_least, real

EarlyStopping = bool | Literal["never"]
MAX_LENGTH_PENALTY = 30.0  # either way: any length that may be counted, to this power, is a float
Best = Sequence[tuple[int, float]]  # (token, log-probability), the best first


@dataclass(frozen=True)
class BeamParams:
    """How beams are searched.

    Attributes:
        num_beams: kept at once, and answers that are kept.
        length_penalty: an answer's score is its log-probability divided by its length to this
            power, -30 to 30: above 0 longer ones gain.
        early_stopping: True ends once there are num_beams answers; False once no beam, at its
            present length, scores better than the worst of them; "never" once none can.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False

    def __post_init__(self) -> None:
        at_least("num_beams", self.num_beams, 1)
        penalty = real("length_penalty", self.length_penalty)
        if not abs(penalty) <= MAX_LENGTH_PENALTY:  # NaN neither
            most = MAX_LENGTH_PENALTY
            raise ValueError(f"length_penalty must lie in [{-most:g}, {most:g}], got {penalty}")
        if self.early_stopping != "never" and not isinstance(self.early_stopping, bool):
            raise ValueError(
                f"early_stopping must be True, False or 'never', got {self.early_stopping!r}"
            )

    def num_kept(self, num_stops: int) -> int:
        """Continuations that are looked at in a step: were the best all to end, as many beams as
        there are would be left."""
        return max(2, 1 + num_stops) * self.num_beams


class Answer(NamedTuple):
    """A text that ended, with its length-penalised log-probability."""

    score: float
    tokens: list[int]  # that were drawn, with the one that ended it


class BeamSearch:
    """The beams of one prompt.

    Args:
        params: BeamParams.
        max_tokens: of an answer at most.
        min_tokens: before so many none of the stop ids may be drawn.
        stop_ids: the first of these ends a text.

    Attributes:
        beams: tokens drawn so far of each beam, the best first.
        answers: the best that ended, the best first, num_beams at most.
    """

    def __init__(
        self,
        params: BeamParams,
        max_tokens: int,
        min_tokens: int = 0,
        stop_ids: Collection[int] = (),
    ) -> None:
        self.params, self._max, self._min = params, max_tokens, min_tokens
        self._stops = stop_ids
        self._scores = [0.0]
        self.beams: list[list[int]] = [[] for _ in range(params.num_beams)]
        self.answers: list[Answer] = []

    @property
    def num_candidates(self) -> int:
        """Of how many tokens step has to be told after each beam, if there are so many."""
        # Enough where no stop id may be drawn too: num_beams of the others are left then.
        return self.params.num_kept(len(self._stops))

    def step(self, best: Sequence[Best]) -> list[int] | None:
        """All beams by one token.

        Args:
            best: of each beam num_candidates tokens that may follow. At first all beams are the
                prompt alone, and the first one's count.

        Returns:
            Which beam each beam goes on from; None once the search is over.
        """
        params, length = self.params, len(self.beams[0]) + 1
        may_stop = length > self._min
        found = heapq.nsmallest(
            params.num_kept(len(self._stops)),
            (
                (-(score + logprob), beam, token)
                for beam, (score, tokens) in enumerate(zip(self._scores, best, strict=False))
                for token, logprob in tokens
                if may_stop or token not in self._stops
            ),
        )
        kept = [(-cost, beam, token) for cost, beam, token in found]
        ends = [token in self._stops or length >= self._max for _, _, token in kept]
        self._note_answers(
            [
                Answer(score / length**params.length_penalty, [*self.beams[beam], token])
                for (score, beam, token), is_end in list(zip(kept, ends, strict=True))[
                    : params.num_beams
                ]
                if is_end
            ]
        )
        going = [one for one, is_end in zip(kept, ends, strict=True) if not is_end]
        going = going[: params.num_beams]
        if len(going) < params.num_beams or not self._may_improve(going[0][0], length):
            return None
        self._scores = [score for score, _, _ in going]
        self.beams = [[*self.beams[beam], token] for _, beam, token in going]
        return [beam for _, beam, _ in going]

    def _note_answers(self, new: Sequence[Answer]) -> None:
        merged = sorted([*self.answers, *new], key=lambda one: -one.score)  # the older of equals
        self.answers = merged[: self.params.num_beams]

    def _may_improve(self, score: float, length: int) -> bool:
        """Whether to go on, the best beam having a score at a length."""
        params = self.params
        if len(self.answers) < params.num_beams:
            return True
        if params.early_stopping is True:
            return False
        if params.early_stopping == "never" and params.length_penalty > 0:
            length = self._max
        return score / length**params.length_penalty > self.answers[-1].score
