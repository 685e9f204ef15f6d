"""BlockManager: what is shared, what is given away, forks, refusals and broken invariants."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llamatelemetry.inference import block_manager
from llamatelemetry.inference.block_manager import BlockManager, OutOfBlocks

PAGE = 3


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


def test_a_prefix_that_was_hidden_goes_from_its_end_too():
    manager = BlockManager(4, PAGE)
    tokens = list(range(4 * PAGE))
    written(manager, "a", tokens)
    assert manager.hide("a", 3 * PAGE + 1) == 3
    assert manager.hide("a", 2 * PAGE) == 0
    assert manager.num_hidden("a") == 3
    manager.allocate("b", [99])
    for name in "ab":
        manager.free(name)
    manager.check()
    assert manager.allocate("c", tokens) == 2 * PAGE


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
