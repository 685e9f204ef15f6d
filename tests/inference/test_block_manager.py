"""BlockManager against a dense model: what each block holds is simulated, token by token."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llamatelemetry.inference import block_manager
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

    def assert_holds(self, name, count):
        tokens = self.manager.tokens(name)
        for position in range(count):
            assert self.slots[self.slot(name, position)] == tuple(tokens[: position + 1])


class Blocks(RuleBasedStateMachine):
    """Random operations; the dense model is a list of tokens a sequence."""

    @initialize(num_blocks=st.integers(0, 9), share=st.booleans())
    def start(self, num_blocks, share):
        self.manager = BlockManager(num_blocks, PAGE, share_prefixes=share)
        self.memory = PagedMemory(self.manager)
        self.dense: dict[int, list[int]] = {}
        self.written: dict[int, int] = {}  # a prefill in chunks leaves some tokens for later
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

    @precondition(lambda self: self.dense)
    @rule(data=st.data())
    def free(self, data):
        name = self.name(data)
        self.manager.free(name)
        del self.dense[name], self.written[name]

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
            self.memory.assert_holds(name, self.written[name])
        if not self.dense:
            assert self.manager.num_available == self.manager.num_blocks


Blocks.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestBlocks = Blocks.TestCase


def written(manager, name, tokens):
    cached = manager.allocate(name, tokens)
    manager.commit(name, len(tokens))
    return cached


def test_blocks_are_given_in_order_and_again_after_a_free():
    manager = BlockManager(6, PAGE)
    assert manager.allocate("a", [1] * 4, reserve=3) == 0
    assert manager.table("a") == [0, 1, 2]
    manager.allocate("b", [1])
    assert manager.table("b") == [3]
    manager.free("b")
    manager.free("a")
    manager.allocate("c", [1] * 10)
    assert manager.table("c") == [0, 1, 2, 3]


def test_a_prefix_is_shared_up_to_the_last_token():
    manager = BlockManager(9, PAGE)
    assert written(manager, "a", [1, 2, 3, 4, 5, 6]) == 0
    assert written(manager, "b", [1, 2, 3, 4, 5, 6]) == 3  # one block is left to compute
    assert written(manager, "c", [1, 2, 3, 4, 5, 6, 7]) == 6
    assert written(manager, "d", [9, 2, 3, 4, 5, 6, 7]) == 0  # equal blocks after another first one
    assert manager.table("c")[:2] == manager.table("a")
    assert manager.table("b")[0] == manager.table("a")[0]
    assert manager.num_available == 9 - 2 - 1 - 1 - 3


def test_what_is_not_committed_is_not_shared():
    manager = BlockManager(9, PAGE)
    manager.allocate("a", [1, 2, 3, 4, 5, 6, 7])
    assert manager.allocate("b", [1, 2, 3, 4, 5, 6, 7]) == 0
    manager.commit("a", 5)
    assert manager.allocate("c", [1, 2, 3, 4, 5, 6, 7]) == 3
    manager.check()


def test_the_least_recently_used_prefix_goes_first_and_from_its_end():
    manager = BlockManager(4, PAGE)
    written(manager, "a", [1] * 6)
    written(manager, "b", [2] * 6)
    manager.free("a")
    manager.free("b")
    assert manager.num_available == 4
    manager.allocate("c", [7])  # takes the last block of a
    assert manager.allocate("d", [1] * 4) == 3  # and one more block: the last of b
    manager.free("d")
    assert manager.allocate("e", [2] * 5) == 3
    manager.check()


def test_a_block_that_was_given_away_is_not_found():
    manager = BlockManager(3, PAGE)
    written(manager, "a", [1] * 7)
    manager.free("a")
    manager.allocate("b", [2] * 5)  # the free block and the second of the prefix
    assert manager.allocate("c", [1] * 3) == 0
    manager.free("b")
    manager.free("c")
    assert manager.allocate("d", [1] * 7) == 0  # its first one went to c
    manager.check()


def test_the_prefix_that_is_shared_cannot_be_given_away():
    manager = BlockManager(2, PAGE)
    written(manager, "a", [1] * 6)
    manager.free("a")
    with pytest.raises(OutOfBlocks, match="1 more blocks of 3 tokens needed, 0 available of 2"):
        manager.allocate("b", [1] * 9)
    manager.check()
    assert manager.allocate("c", [1] * 6) == 3


def test_equal_hashes_do_not_share():
    class Token(int):
        def __hash__(self):
            return 0

    manager = BlockManager(9, PAGE)
    first = [Token(token) for token in (1, 2, 3, 4, 5, 6, 7)]
    second = [Token(token) for token in (1, 2, 4, 4, 5, 6, 7)]
    assert written(manager, "a", first) == 0
    assert written(manager, "b", second) == 0
    assert written(manager, "c", first) == 6


def test_a_fork_copies_its_tail_before_it_writes():
    manager = BlockManager(4, PAGE)
    written(manager, "a", [1, 2, 3, 4])
    manager.fork("a", "b")
    assert manager.table("b") == manager.table("a") == [0, 1]
    assert manager.append("b", [5]) == [(1, 2)]
    assert manager.append("b", [6]) == manager.append("a", [5]) == []
    assert manager.reserve("a", 4) == []
    assert (manager.table("a"), manager.table("b")) == ([0, 1, 3], [0, 2])


def test_refusals():
    manager = BlockManager(3, PAGE)
    manager.allocate("a", [1, 2, 3, 4])
    with pytest.raises(OutOfBlocks) as caught:
        manager.allocate("b", [1] * 5, reserve=2)
    assert str(caught.value) == (
        "Out of KV cache memory: 3 more blocks of 3 tokens needed, 1 available of 3 (1 sequences "
        "at work); free a sequence or use a larger cache"
    )
    for call, sentence in [
        (lambda: manager.allocate("a", [1]), "sequence must be a new one, got 'a' again"),
        (lambda: manager.fork("a", "a"), "child must be a new sequence, got 'a' again"),
        (lambda: manager.free("z"), "sequence must be allocated first, got 'z'"),
        (lambda: manager.commit("a", 5), r"num_tokens must lie in \[0, 4\] for sequence 'a'"),
        (lambda: BlockManager(1, 0), "page_size must be at least 1, got 0"),
        (lambda: BlockManager(-1, 1), "num_blocks must be at least 0, got -1"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            call()


def test_check_names_what_is_broken():
    manager = BlockManager(3, PAGE)
    written(manager, "a", [1, 2, 3, 4])
    manager.check()
    manager._references[0] += 1
    with pytest.raises(RuntimeError, match="as many references as tables hold it"):
        manager.check()
    manager._references[0] -= 1
    manager._free.append(0)
    with pytest.raises(RuntimeError, match=r"only one of these; .*idle or referenced"):
        manager.check()


def test_it_needs_no_torch():
    code = (
        "import importlib.util, sys; "
        f"spec = importlib.util.spec_from_file_location('blocks', {block_manager.__file__!r}); "
        "module = importlib.util.module_from_spec(spec); sys.modules['blocks'] = module; "
        "spec.loader.exec_module(module); module.BlockManager(2, 2).check(); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
