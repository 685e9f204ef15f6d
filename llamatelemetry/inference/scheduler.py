"""Which tokens of which requests the next forward runs on: one budget a step. No torch.

Requests at work come first, then those that wait, by priority and arrival; the last prompt is cut
into chunks where the budget ends. Where no block is left for a token, the request that goes last
gives its blocks up, and computes them again later or has them back from the host's memory: its
tokens stay, so its text does too.
"""

from __future__ import annotations

from llamatelemetry.inference.admission import has_room
from llamatelemetry.inference.block_manager import BlockManager, NeverFits, OutOfBlocks
from llamatelemetry.inference.host_blocks import HostBlocks
from llamatelemetry.inference.interrupts import as_one
from llamatelemetry.inference.plan import Piece as Piece
from llamatelemetry.inference.plan import Plan as Plan
from llamatelemetry.inference.scheduled_request import ScheduledRequest, insert
from llamatelemetry.inference.scheduler_books import broken_rules, check_limits

# How much a request that ends changes the share of max_tokens that others are expected to use.
SHARE_RATE = 0.1


class Scheduler:
    """Plans steps over the blocks of one cache. Not thread-safe: the caller holds a lock.

    A request is admitted only if, were every one at work to become as long as is to be expected,
    no step would be short of blocks: requests that give up their blocks at once would cost more
    than they bring. What is to be expected is a share of max_tokens: that which finished requests
    have used lately, and all of it after every preemption.

    Args:
        blocks: BlockManager, with no sequences in it.
        max_step_tokens: tokens of one forward at most; at least max_running, so that every
            request at work can decode in every step.
        max_running: requests at work at most.
        expected_share: the share to begin with.
        num_host_blocks: of the host's memory, to which blocks that are given up are copied.
        is_fixed: whether a prompt is cut into the same chunks whatever others there are: of
            max_step_tokens less max_running, one a step.
        prefill_chunk: tokens of prompts at most in a step in which others decode and wait for
            them; None is as many as max_step_tokens allows.

    Attributes:
        running: requests that have blocks, in order of rank.
        waiting: the others, likewise.
        window: keys before a token that it and later ones look at in any layer, its own included:
            blocks of none but earlier ones are given back; None is all.
    """

    window: int | None = None

    def __init__(
        self,
        blocks: BlockManager,
        max_step_tokens: int,
        max_running: int,
        expected_share: float = 1.0,
        num_host_blocks: int = 0,
        is_fixed: bool = False,
        prefill_chunk: int | None = None,
    ) -> None:
        check_limits(max_step_tokens, max_running, expected_share, is_fixed)
        self._chunk = max_step_tokens - max_running if is_fixed else 0
        self.blocks, self.host = blocks, HostBlocks(blocks, num_host_blocks)
        self.max_step_tokens, self.max_running = max_step_tokens, max_running
        self.prefill_chunk = max_step_tokens if prefill_chunk is None else prefill_chunk
        self.expected_share = expected_share
        self.running: list[ScheduledRequest] = []
        self.waiting: list[ScheduledRequest] = []
        self._refused: ScheduledRequest | None = None  # the first to wait, until blocks are freed

    def require_fit(self, request: ScheduledRequest, count: int = 1) -> None:
        """Raises NeverFits for a request that the whole cache could not hold count times."""
        needed = self.blocks.blocks_for(request.most_tokens) * count
        if needed > self.blocks.num_blocks:
            beams = f" in each of {count} beams" if count > 1 else ""
            raise NeverFits(
                f"Out of KV cache memory: a prompt of {len(request.prompt)} tokens and "
                f"{request.max_tokens} more{beams} need {needed} blocks of {self.blocks.page_size} "
                f"tokens, the whole cache has {self.blocks.num_blocks}"
            )

    def add(self, request: ScheduledRequest) -> None:
        """Puts a new request in the queue.

        Raises:
            NeverFits: for one that the whole cache could not hold; nothing was changed.
        """
        self.require_fit(request)
        insert(self.waiting, request)

    def schedule(self) -> Plan:
        """The next step's tokens. What was planned and never computed is planned again; what was
        drafted for a request is planned once."""
        plan = Plan()
        for request in list(self.running):
            length = len(request.tokens) + request.num_ahead + max(len(request.draft), 1)
            if request.room < length and request.num_placed and not request.is_drawn_out:
                self._place(request, plan)
        budget, prompts = self.max_step_tokens, []
        # Those that decode first: a long prompt never makes them wait.
        for request in self.running:
            if request.num_left > 1:
                prompts.append(request)
            else:
                budget -= self._plan(request, budget, plan)
        if plan.pieces:
            budget = min(budget, self.prefill_chunk)
        for request in prompts:
            budget -= self._plan(request, budget, plan)
        while budget and self.waiting and not plan.preempted:
            request = self.waiting[0]
            if len(self.running) >= self.max_running or not self._admit(request, plan):
                break
            budget -= self._plan(request, budget, plan)
        return plan

    def launched(self, piece: Piece) -> None:
        """Says that a piece's forward was launched, whose results the host will see later: the next
        plan goes on from there. Launched pieces are computed in the same order."""
        piece.request.num_computed = piece.end
        piece.request.num_ahead += piece.draws

    def computed(self, piece: Piece) -> None:
        """Says that a piece's keys and values are in the cache. If it was launched, seen is to be
        called first."""
        request = piece.request
        request.num_computed = max(request.num_computed, piece.end)
        if piece.end % self.blocks.page_size and piece.end - piece.begin == 1:
            return  # it fills no block that others could share
        if piece.end > request.num_placed:  # drawn tokens: their block was reserved
            self.blocks.append(request.name, request.tokens[request.num_placed : piece.end])
            request.num_placed = piece.end
        self.blocks.commit(request.name, piece.end)
        if self.window is not None:
            hidden = self.blocks.hide(request.name, max(piece.end - self.window + 1, 0))
            self._refused = None if hidden else self._refused

    def seen(self, piece: Piece) -> None:
        """Says that the host knows what a launched piece has drawn, and that the request takes it
        next."""
        piece.request.num_ahead -= piece.draws

    def give_back(self, request: ScheduledRequest) -> None:
        """Frees the blocks of drafted tokens that were not the right ones."""
        if request in self.running:
            tokens = request.tokens[request.num_placed : request.num_computed]
            self.blocks.append(request.name, tokens)
            request.num_placed += len(tokens)
            self.blocks.truncate(request.name, request.num_placed)
            self._note_blocks(request)

    def fork(self, request: ScheduledRequest, sibling: ScheduledRequest) -> None:
        """Puts a sibling at work, that shares the blocks of a request whose prompt was computed;
        or in the queue where no more may be at work, as if it were preempted then."""
        if len(self.running) >= self.max_running:
            insert(self.waiting, sibling)
            return
        self.blocks.fork(request.name, sibling.name)
        sibling.num_computed, sibling.num_placed = request.num_computed, request.num_placed
        sibling.table = self.blocks.table(sibling.name)
        request.room = sibling.room = 0  # who writes first copies the last block
        sibling.num_cached = len(sibling.prompt)
        insert(self.running, sibling)

    def end(self, request: ScheduledRequest, reason: str | None = None) -> None:
        """Takes a request out, wherever it is, and frees its blocks.

        Args:
            request: one that was added and not ended.
            reason: its finish_reason, where take has set none.
        """
        request.finish_reason = request.finish_reason or reason
        if request in self.waiting:
            self.waiting.remove(request)
            self.host.drop(request)
        else:
            self.running.remove(request)
            self._free(request)
        if request.finish_reason in ("stop", "length"):
            used = request.num_drawn / request.max_tokens
            self.expected_share += SHARE_RATE * (used - self.expected_share)
        self._refused = None

    def preempt(self, request: ScheduledRequest, plan: Plan | None = None) -> None:
        """Puts a request that is at work back in the queue; its tokens stay, and with a plan to
        copy them by the keys and values that the host has room for."""
        self.running.remove(request)
        if plan is not None:
            plan.swaps_out += self.host.swap_out(request)
        self._free(request)
        request.preemptions += 1
        insert(self.waiting, request)
        self.expected_share = 1.0

    def compute_anew(self) -> None:
        """Puts all requests that are at work back in the queue; of none are keys and values kept
        on the host. Called again where it was interrupted, it goes on."""
        for request in list(self.running):
            self.preempt(request)
        for request in self.waiting:
            self.host.drop(request)

    @as_one
    def follow_window(self, window: int | None) -> None:
        """Another window, as a model's config may say. Everything is computed anew for one that
        shows keys that were given back."""
        old, self.window = self.window, window
        if old is not None and (window is None or window > old):
            self.compute_anew()

    def _place(self, request: ScheduledRequest, plan: Plan) -> None:
        """Blocks for tokens that were drawn, from those that go last where none is left."""
        tokens = request.tokens[request.num_placed :]
        while True:
            try:
                # One more, for a decode step moves its rows on to the next position by itself.
                count = len(tokens) + request.num_ahead + max(len(request.draft), 1)
                plan.copies += self.blocks.reserve(request.name, count)
            except OutOfBlocks:
                if request.draft or self._drop_drafts():  # nobody gives way to another's draft
                    request.draft = ()
                    continue
                last = self.running[-1]
                self.preempt(last, plan)
                plan.preempted.append(last)
                if last is request:
                    return
            else:
                self.blocks.append(request.name, tokens)
                request.num_placed += len(tokens)
                self._note_blocks(request)
                return

    def _drop_drafts(self) -> bool:
        """Frees what is reserved for drafts; returns whether there were any."""
        drafting = [one for one in self.running if one.draft]
        for one in drafting:
            if one.room >= len(one.tokens) + one.num_ahead + len(one.draft):
                self.blocks.append(one.name, one.tokens[one.num_placed :])
                one.num_placed = len(one.tokens)
                self.blocks.truncate(one.name, one.num_placed)
                self.blocks.reserve(one.name, one.num_ahead + 1)  # as many as _place reserves
                self._note_blocks(one)
            one.draft = ()
        return bool(drafting)

    def _note_blocks(self, request: ScheduledRequest) -> None:
        request.table = self.blocks.table(request.name)
        request.room = len(request.table) * self.blocks.page_size

    def _plan(self, request: ScheduledRequest, budget: int, plan: Plan) -> int:
        """Puts as many of a request's tokens as the budget allows in the plan; returns how many."""
        left = 0 if request.is_drawn_out else request.num_left
        count = min(left, self._chunk or budget)
        if not 0 < count <= budget:
            return 0
        begin = request.num_computed
        draft, request.draft = tuple(request.draft), ()
        end, draws = begin + count, count == left
        plan.pieces.append(Piece(request, begin, end, request.table, draws, draft))
        return count + len(draft)

    def _admit(self, request: ScheduledRequest, plan: Plan) -> bool:
        """Gives the first that waits its blocks, if there is room for it to go on."""
        if self.running and (
            request is self._refused
            or not has_room(self.blocks, self.running, request, self.expected_share, self.window)
        ):
            self._refused = request
            return False
        try:
            cached = self.blocks.allocate(request.name, request.tokens, reserve=1)
        except OutOfBlocks:
            self._refused = request
            return False
        cached, swaps = self.host.swap_in(request, cached)
        plan.swaps_in += swaps
        self.waiting.remove(request)
        request.num_computed, request.num_placed = cached, len(request.tokens)
        self._note_blocks(request)
        if request.num_cached is None:
            request.num_cached = cached
        insert(self.running, request)
        return True

    def _free(self, request: ScheduledRequest) -> None:
        self.blocks.free(request.name)
        request.num_computed = request.num_placed = request.room = 0
        request.table, request.draft = [], ()
        self._refused = None

    def check(self) -> None:
        """Walks every invariant; raises RuntimeError that names those that do not hold."""
        self.blocks.check()
        self.host.check()
        broken = broken_rules(self.running, self.waiting, self.blocks, self.max_running)
        if broken:
            raise RuntimeError(f"Scheduler: broken invariants: {'; '.join(broken)}")
