"""BlockManager against a dense model: what each block holds is simulated, token by token."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llamatelemetry.inference.block_manager import BlockManager, OutOfBlocks

PAGE = 3
# Few different prefixes, so that many are shared.
TOKENS = st.one_of(
    st.integers(0, 14).map(lambda count: [1] * count),
    st.lists(st.integers(0, 1), max_size=14),
)


class PagedMemory:
    """A cache whose slots hold what keys depend on: the tokens up to and with their own."""

    def __init__(self, manager):
        self.manager, self.slots = manager, {}

    def slot(self, name, position):
        return self.manager.table(name)[position // PAGE], position % PAGE

    def write(self, name, begin):
        tokens = self.manager.tokens(name)
        for position in range(begin, len(tokens)):
            self.slots[self.slot(name, position)] = tuple(tokens[: position + 1])

    def copy(self, pairs):
        for source, destination in pairs:
            for offset in range(PAGE):
                self.slots[destination, offset] = self.slots.get((source, offset))

    def assert_holds(self, name, count, begin=0):
        tokens = self.manager.tokens(name)
        for position in range(begin, count):
            assert self.slots[self.slot(name, position)] == tuple(tokens[: position + 1])


class Blocks(RuleBasedStateMachine):
    """Random operations; the dense model is a list of tokens a sequence."""

    @initialize(num_blocks=st.integers(0, 9), share=st.booleans())
    def start(self, num_blocks, share):
        self.manager = BlockManager(num_blocks, PAGE, share_prefixes=share)
        self.memory = PagedMemory(self.manager)
        self.dense: dict[int, list[int]] = {}
        self.written: dict[int, int] = {}  # a prefill in chunks leaves some tokens for later
        self.hidden: dict[int, int] = {}  # leading tokens of which nothing is read any more
        self.next_name = 0

    def name(self, data):
        return data.draw(st.sampled_from(sorted(self.dense)))

    def fails(self, operation, needed):
        """Runs an operation that may be out of blocks, and then changes nothing."""
        before = self.manager.num_available
        try:
            return operation()
        except OutOfBlocks as error:
            sentence = str(error)
        assert needed > 0
        assert f"of {self.manager.num_blocks}" in sentence
        assert self.manager.num_available == before
        return None

    @rule(
        tokens=TOKENS,
        reserve=st.integers(0, 5),
        chunk=st.integers(0, 14),
    )
    def allocate(self, tokens, reserve, chunk):
        name, self.next_name = self.next_name, self.next_name + 1
        needed = self.manager.blocks_for(len(tokens) + reserve)
        cached = self.fails(lambda: self.manager.allocate(name, tokens, reserve), needed)
        if cached is None:
            assert self.manager.num_available < needed
            return
        assert cached % PAGE == 0
        assert cached < max(len(tokens), 1)
        self.memory.assert_holds(name, cached)
        self.dense[name], self.written[name] = list(tokens), cached
        assert len(self.manager.table(name)) == needed
        if chunk >= len(tokens):
            self.write(name)

    def write(self, name):
        self.memory.write(name, self.written[name])
        self.written[name] = len(self.dense[name])
        self.manager.commit(name, self.written[name])

    @precondition(lambda self: self.dense)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), max_size=5), ahead=st.integers(0, 4))
    def append(self, data, tokens, ahead):
        name = self.name(data)
        pairs = self.fails(lambda: self.manager.reserve(name, ahead), ahead)
        self.memory.copy(pairs or [])
        pairs = self.fails(lambda: self.manager.append(name, tokens), len(tokens))
        if pairs is not None:
            self.memory.copy(pairs)
            self.dense[name] += tokens
            self.write(name)

    @precondition(lambda self: self.dense)
    @rule(data=st.data())
    def fork(self, data):
        parent, child, self.next_name = self.name(data), self.next_name, self.next_name + 1
        self.write(parent)
        self.manager.fork(parent, child)
        self.dense[child], self.written[child] = list(self.dense[parent]), self.written[parent]
        self.hidden[child] = self.hidden.get(parent, 0)

    @precondition(lambda self: self.dense)
    @rule(data=st.data(), window=st.integers(1, 9))
    def hide(self, data, window):
        """As behind a sliding window: what no later token looks at."""
        name = self.name(data)
        before, table = self.manager.num_available, self.manager.table(name)
        count = max(self.written[name] - window + 1, 0)
        self.manager.hide(name, count)
        self.hidden[name] = max(self.hidden.get(name, 0), count // PAGE * PAGE)
        assert self.manager.num_hidden(name) * PAGE == self.hidden[name]
        assert self.manager.num_available >= before
        assert self.manager.table(name) == table

    @precondition(lambda self: self.dense)
    @rule(data=st.data())
    def free(self, data):
        name = self.name(data)
        self.manager.free(name)
        del self.dense[name], self.written[name]
        self.hidden.pop(name, None)

    @rule(count=st.integers(0, 2))
    def grow(self, count):
        self.manager.add_blocks(count)

    @rule()
    def forget(self):
        self.manager.forget_prefixes()

    @invariant()
    def every_token_is_where_the_table_says(self):
        if not hasattr(self, "manager"):
            return
        self.manager.check()
        for name, tokens in self.dense.items():
            assert self.manager.tokens(name) == tokens
            self.memory.assert_holds(name, self.written[name], self.hidden.get(name, 0))
        if not self.dense:
            assert self.manager.num_available == self.manager.num_blocks


Blocks.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestBlocks = Blocks.TestCase
