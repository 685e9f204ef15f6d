"""The requests that are open, their scheduler and their cache: one step after the other."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from llamatelemetry.inference.beam_group import make_way, shown
from llamatelemetry.inference.block_manager import BlockManager
from llamatelemetry.inference.cache_room import CacheRoom
from llamatelemetry.inference.host_pages import HostPages
from llamatelemetry.inference.interrupts import as_one, uninterrupted
from llamatelemetry.inference.kv_pages import floating_parameter
from llamatelemetry.inference.launched import Flight
from llamatelemetry.inference.model_drafts import drafts_of
from llamatelemetry.inference.open_requests import OpenRequests
from llamatelemetry.inference.plan_runner import PlanRunner
from llamatelemetry.inference.request_handle import RequestHandle
from llamatelemetry.inference.runner import PAGE_SIZE
from llamatelemetry.inference.scheduler import Plan, Scheduler
from llamatelemetry.inference.speculation import Speculation
from llamatelemetry.inference.stream_order import StreamOrder
from llamatelemetry.inference.window import window_of


class RunningBatch(OpenRequests):
    """What ContinuousBatching does under its lock.

    Args:
        model: a patched transformers model.
        max_rows: requests at work at once.
        step_tokens: tokens of a step at most.
        num_blocks: of the cache; None grows it to what max_rows requests may need.
        share_prefixes, num_host_blocks, prefill_chunk: as in BlockManager and Scheduler.
        split_size, cache_dtype: as in PlanRunner.
        overlap: whether a step's tokens are looked at once the next step was launched.
        speculation: Speculation; None drafts nothing.

    Attributes:
        plan: of the last step; the caller may take it.
    """

    plan: Plan | None = None

    def __init__(
        self,
        model: Any,
        max_rows: int,
        step_tokens: int,
        num_blocks: int | None,
        share_prefixes: bool,
        num_host_blocks: int = 0,
        overlap: bool = False,
        cache_dtype: torch.dtype | None = None,
        split_size: int = 0,
        speculation: Speculation | None = None,
        prefill_chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.max_rows, self.overlap = model, max_rows, overlap
        self._split_size, self._chunk, self._speculation = split_size, prefill_chunk, speculation
        self._step_tokens, self._fixed, self._share = step_tokens, num_blocks, share_prefixes
        self._num_host_blocks, self._cache_dtype = num_host_blocks, cache_dtype
        self._flights: deque[Flight] = deque()
        self._is_torn = self._is_uncopied = False
        self._begin(allocates=True)

    def _begin(self, *, allocates: bool = False) -> None:
        """An empty cache, as the model is now.

        Args:
            allocates: whether what has a fixed number of blocks is allocated here; else when the
                first request needs it.

        Raises:
            ValueError: there is no memory for so many.
        """
        self._like = floating_parameter(self.model)
        self._host, self._order = HostPages(self._num_host_blocks), StreamOrder(self._like.device)
        self._order.follow()  # in the middle of a step it may be made anew
        config = None if self._speculation is None else self._speculation.config
        longest = 0 if config is None else config.num_speculative_tokens
        rows = self._asked_of, self.max_rows, PAGE_SIZE
        self._runner = PlanRunner(self.model, *rows, self._cache_dtype, self._split_size, longest)
        self._drafts = drafts_of(config, *rows)
        if allocates:
            self._allocate()  # before the books of as many blocks
        blocks = BlockManager(self._fixed or 0, PAGE_SIZE, share_prefixes=self._share)
        self.scheduler = Scheduler(
            *(blocks, self._step_tokens, self.max_rows),
            num_host_blocks=self._num_host_blocks,
            is_fixed=self._split_size > 0,
            prefill_chunk=self._chunk,
        )
        self._host.costs = self.scheduler.host.costs = self._runner.costs
        room = self.model, self.max_rows, self._fixed, self._share
        self._room = CacheRoom(*room, self.scheduler, self._runner, self._drafts)

    def _allocate(self) -> None:
        """Pages of a fixed number, so that no step fails for want of them."""
        pages, fixed = self._runner.runner.pages, self._fixed
        name, count = "num_blocks", fixed
        try:
            with torch.inference_mode(False):  # steps may be run in another mode
                if fixed is not None:
                    pages.grow(fixed, keep=False)
                    if self._drafts is not None:
                        self._drafts.grow(fixed)
                name, count = "num_host_blocks", self._num_host_blocks
                self._host.allocate(pages)
        except (RuntimeError, MemoryError, TypeError) as error:  # the last beyond 64 bits
            raise ValueError(
                f"ContinuousBatching: {name} must be as many as there is memory for, got {count} "
                f"of {pages.block_bytes} bytes: {str(error).partition(chr(10))[0]}"
            ) from error

    @property
    def decode_mode(self) -> str:
        return self._runner.decode_mode

    def step(self) -> list[RequestHandle]:
        """Returns handles of the requests that a forward ran on, or that ended.

        With overlap a forward's tokens are taken in the step after it, while the next one is at
        work already, which has the rows' tokens on the device: of a request that ended meanwhile it
        draws one token in vain, into a block of which nothing is read any more.
        """
        self._order.follow()
        if self._is_uncopied:  # before anything lands, which would be committed in such blocks
            with uninterrupted():
                self.scheduler.compute_anew()
                self._is_torn, self._is_uncopied = True, False
        touched = self.reap()
        pages = self._runner.runner.pages
        if (self._like.dtype, self._like.device) != (pages.model_dtype, pages.device):
            touched += self._move()
        touched += self._take_all_in()
        self.scheduler.follow_window(window_of(self.model))
        if self._is_torn or any(one.num_ahead for one in self.scheduler.waiting):
            touched += self._land()  # rows stand nobody knows where, or gave their blocks up
            self._is_torn = False
        touched += self._draft()
        plan = self._planned()
        if self.overlap and self._runner.can_launch(plan):
            try:
                self._launch(plan)
            except Exception:  # run again below, which says whose it is
                self._is_torn = False
            else:
                self.plan = plan
                touched += self._land(but=1 if plan.pieces else 0)
                return self._noted(plan, touched)
        if self._flights:
            touched += self._land()
            preempted, plan = plan.preempted, self._planned()
            plan.preempted[:0] = preempted
        if self._drafts is not None:
            self._drafts.fill(plan, self._runner.width)
        self.plan = plan
        for piece, result in self._runner.run(plan):
            touched += self._put_down(piece, result)
        return self._noted(plan, touched)

    @as_one
    def _draft(self) -> list[RequestHandle]:
        """Drafts tokens for the next plan, where that may bring something."""
        touched, speculation = [], self._speculation
        if speculation is not None:
            if speculation.is_due(self.scheduler):
                touched = self._land()
                speculation.draft(self.scheduler)
            speculation.begin(len(self._flights))
        return touched

    @as_one
    def _noted(self, plan: Plan, touched: list[RequestHandle]) -> list[RequestHandle]:
        """touched as callers see it: one may have drawn several tokens in a step."""
        if self._speculation is not None:
            flights, verifier = len(self._flights), self._runner.verifier
            self._speculation.note(plan, self.scheduler, flights, verifier)
        return shown(touched)

    def _planned(self) -> Plan:
        """The next plan, its copies of blocks made."""
        self._is_uncopied = True  # the scheduler's books have them as made already
        with uninterrupted():
            plan = self.scheduler.schedule()
            make_way(self.scheduler, plan)
        self._host.make_copies(plan, self._runner.runner.pages)
        self._is_uncopied = False
        for request in plan.beginning():
            for one in request.draws_for:  # its forward is that of all answers to the prompt
                self.open[one.name].begins()
        return plan

    def _launch(self, plan: Plan) -> None:
        if not plan.pieces:
            return
        self._is_torn = True
        before = self._flights[-1].launched if self._flights else None
        launched = self._runner.launch(plan, before)
        with uninterrupted():
            for piece in plan.pieces:
                self.scheduler.launched(piece)
            self._flights.append(Flight(launched, plan.pieces))
            self._is_torn = False

    @as_one
    def _land(self, but: int = 0) -> list[RequestHandle]:
        """Takes what the plans that were launched have drawn, the last few left out."""
        touched: list[RequestHandle] = []
        while len(self._flights) > but:
            flight = self._flights[0]
            for piece, result in flight.results():
                touched += self._put_down(piece, result, flight.preemptions[piece.request])
            self._flights.popleft()
        return touched

    @as_one
    def _take_all_in(self) -> list[RequestHandle]:
        """Gives the scheduler the new requests; returns those which that ends."""
        ended: list[RequestHandle] = []
        if self.incoming and not self._runner.runner.serves(self.model):
            ended += self._move()  # its parameters are others
        has_room = False
        for _ in range(len(self.incoming)):  # what comes meanwhile waits for the next step
            handle = self.incoming.popleft()
            if handle.request.name not in self.open:  # reaped while submit was at it
                continue
            try:
                # Once for all that are open, where that is possible: it looks at every weight.
                has_room = has_room or self._room.make(
                    handle.request, [one.request for one in list(self.open.values())]
                )
                self.scheduler.add(handle.request)
            except Exception as error:
                self._end(handle, error)
                ended += handle.together
        return ended

    @as_one
    def _move(self) -> list[RequestHandle]:
        """The model has another device or dtype: everything at work is computed anew."""
        touched = self._land()
        requests = [*self.scheduler.running, *self.scheduler.waiting]
        self.scheduler.compute_anew()
        self._begin()
        self.incoming.extendleft(self.open[request.name] for request in reversed(requests))
        return touched
