"""The rows of one generation: what the host knows of them between two steps, and their steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llamatelemetry.inference.ahead import Run
from llamatelemetry.inference.block_manager import BlockManager
from llamatelemetry.inference.penalised_step import PenalisedStep
from llamatelemetry.inference.runner import DecodeStep, StepRunner
from llamatelemetry.inference.sampling import SamplingTensors, nan_error
from llamatelemetry.inference.step import Chunk


@dataclass
class Rows:
    """The rows of one generate.

    Attributes:
        width: blocks of the longest row
        tables: blocks of each row
        lengths: tokens of each row, the last included, whose keys are not in the cache
        seen: all tokens of each row, where any has a repetition penalty; else None
        tokens: the last of each row
        count: tokens drawn for each active row
        ahead: the next step, where it was launched before its turn
    """

    turn: int
    runner: StepRunner
    blocks: BlockManager
    width: int
    sampling: SamplingTensors
    tables: list[list[int]]
    lengths: list[int]
    seen: list[list[int]] | None = None
    vocab_size: int = 0  # of the logits
    tokens: list[int] = field(default_factory=list)
    active: list[bool] = field(default_factory=list)
    count: int = 0
    ahead: Run | None = None

    def took(self, tokens: list[int]) -> None:
        """Notes what a step has drawn."""
        # A row that has ended may draw -1, which would be embedded where the rows are loaded again.
        self.tokens = [max(token, 0) for token in tokens]
        self.count += 1
        for row, token in enumerate(tokens):
            if self.active[row]:
                self.lengths[row] += 1
                if self.seen is not None:
                    self.seen[row].append(token)

    def step(self, *, has_changed: bool, goes_on: bool) -> str:
        """One more token of every active row.

        A run that was launched ahead had rows active that have ended since: they wrote to blocks of
        their own, and nobody looks at their tokens.

        Args:
            has_changed: whether other rows are active than in the step before.
            goes_on: whether a step of these rows is likely to follow.

        Returns:
            How it was run.

        Raises:
            FloatingPointError: when an active row's logits are NaN.
        """
        run = self._taken()
        if run is None:
            run = Run(self.runner.draw(lambda: self._loaded(has_changed=has_changed))[0])
        elif has_changed and run.step.owner == self.turn:
            run.step.hold(self.active)
        if goes_on:
            self._launch_after(run)
        tokens = run.tokens()
        if any(token < 0 and is_on for token, is_on in zip(tokens, self.active, strict=True)):
            raise nan_error(run.step.logits.dtype)
        self.took(tokens)
        return run.step.mode

    def _taken(self) -> Run | None:
        """The run that was launched ahead, if it is of the model as it is now."""
        run, self.ahead = self.ahead, None
        if run is None:
            return None
        if self.runner.is_of_the_model(run.step) and run.step.versions() == run.versions:
            return run
        if run.step.owner == self.turn:
            run.step.owner = None  # where the rows stood is lost: they are loaded again
        return None

    def _launch_after(self, run: Run) -> None:
        """The next step behind a run, where nothing is to be done between them. Whether the model
        is what it was has just been looked at, for that run."""
        step = run.step
        if step.runs_ahead and step.owner == self.turn and self.runner.has(step):
            versions = step.versions() if run.versions is None else run.versions
            step.run()
            self.ahead = Run(step, versions)

    def _loaded(self, *, has_changed: bool) -> DecodeStep:
        """The decode step of these rows, with them in place."""
        kind = DecodeStep if self.seen is None else PenalisedStep
        step = self.runner.step_of(kind, len(self.tables), self.width)
        if step.owner != self.turn:
            rows = zip(self.tokens, self.lengths, self.tables, strict=True)
            chunks = [Chunk([token], length - 1, table) for token, length, table in rows]
            counts = [self.count] * len(chunks)
            step.load(self.turn, chunks, self.sampling, counts, self.active)
            if self.seen is not None and isinstance(step, PenalisedStep):
                step.load_seen(self.seen, self.vocab_size)
        elif has_changed:
            step.hold(self.active)
        return step

    def free(self) -> None:
        for row in reversed(range(len(self.tables))):
            self.blocks.free((self.turn, row))


def prefill_pieces(lengths: Sequence[int], budget: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cuts rows of these lengths into (row, begin, end) pieces of at most budget tokens a chunk."""
    pieces: list[tuple[int, int, int]] = []
    room = budget
    for row, length in enumerate(lengths):
        begin = 0
        while begin < length:
            end = min(length, begin + room)
            pieces.append((row, begin, end))
            room -= end - begin
            begin = end
            if room == 0:
                yield pieces
                pieces, room = [], budget
    if pieces:
        yield pieces
