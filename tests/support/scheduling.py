"""A scheduler with a fake model, whose cache is a dict of the tokens that keys depend on."""

from __future__ import annotations

from dataclasses import dataclass, field

from llamatelemetry.inference.block_manager import BlockManager
from llamatelemetry.inference.scheduled_request import ScheduledRequest
from llamatelemetry.inference.scheduler import Scheduler

PAGE = 3
VOCAB = 5
END = 4


def next_token(tokens, forbidden=()):
    """The fake model's greedy token: depends on every token before it."""
    token = hash(tuple(tokens)) % VOCAB
    while token in forbidden:
        token = (token + 1) % VOCAB
    return token


def alone(prompt, max_tokens, min_tokens, stop_ids):
    """What the fake model gives for one request, without any scheduler."""
    tokens = list(prompt)
    for count in range(max_tokens):
        tokens.append(next_token(tokens, stop_ids if count < min_tokens else ()))
        if tokens[-1] in stop_ids and count >= min_tokens:
            break
    return tokens[len(prompt) :]


@dataclass
class World:
    """A scheduler, and a cache whose slots hold the tokens that their keys depend on."""

    scheduler: Scheduler
    slots: dict = field(default_factory=dict)
    started: list = field(default_factory=list)
    swapped: int = 0  # blocks that came back

    def slot(self, table, position):
        return table[position // PAGE], position % PAGE

    def step(self, fails=()):
        plan = self.scheduler.schedule()
        self.scheduler.check()
        assert not (plan.swaps_out and plan.swaps_in)
        self.swap(plan)
        for source, destination in plan.copies:
            for offset in range(PAGE):
                self.slots[destination, offset] = self.slots.get((source, offset))
        assert plan.num_tokens <= self.scheduler.max_step_tokens
        names = [piece.request.name for piece in plan.pieces]
        assert len(set(names)) == len(names)
        for piece in plan.pieces:
            self.compute(piece, fails)
        self.scheduler.check()
        return plan

    def swap(self, plan):
        for source, destination in plan.swaps_out:
            for offset in range(PAGE):
                self.slots["host", destination, offset] = self.slots.get((source, offset))
        for source, destination in plan.swaps_in:
            for offset in range(PAGE):
                self.slots[destination, offset] = self.slots["host", source, offset]
        self.swapped += len(plan.swaps_in)

    def compute(self, piece, fails):
        request = piece.request
        if request.name not in self.started:
            self.started.append(request.name)
        for position in range(piece.begin):
            assert self.slots[self.slot(piece.table, position)] == tuple(
                request.tokens[: position + 1]
            )
        if request.name in fails:  # what a forward that raises leaves: nothing noted
            return
        assert len(piece.table) > piece.end // PAGE or not piece.draws  # the next one has a block
        for position in range(piece.begin, piece.end):
            self.slots[self.slot(piece.table, position)] = tuple(request.tokens[: position + 1])
        self.scheduler.computed(piece)
        if piece.draws:
            assert piece.end == len(request.tokens)
            request.take(next_token(request.tokens, request.forbidden))
            if request.finish_reason:
                self.scheduler.end(request)


def make(num_blocks=20, budget=16, max_running=4, **options):
    return World(Scheduler(BlockManager(num_blocks, PAGE), budget, max_running, **options))


def a_request(name, prompt_tokens=3, max_tokens=4, **options):
    prompt = [(name * 7 + i) % 4 for i in range(prompt_tokens)]
    return ScheduledRequest(name, prompt, max_tokens, arrival=name, **options)


def run(world):
    plans = []
    while world.scheduler.running or world.scheduler.waiting:
        plans.append(world.step())
    return plans
