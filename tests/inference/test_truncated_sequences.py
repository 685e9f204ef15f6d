"""Sequences of the paged cache that lose their last tokens."""

from __future__ import annotations

import pytest

from llamatelemetry.inference.block_manager import BlockManager

PAGE = 3


def test_a_truncated_sequence_gives_blocks_back_and_copies_its_tail_before_it_writes():
    manager = BlockManager(4, PAGE)
    manager.allocate("a", [1, 2, 3, 4, 5, 6])
    manager.fork("a", "b")
    manager.commit("a", 6)
    manager.append("b", [7])
    manager.truncate("b", 5)
    manager.check()
    assert (manager.table("b"), manager.tokens("b")) == ([0, 1], [1, 2, 3, 4, 5])
    assert manager.num_available == 2
    manager.free("a")
    # Only b has the block now, but it is cached under tokens that b no longer has.
    assert manager.append("b", [9])[0][0] == 1
    manager.check()
    assert manager.allocate("c", [1, 2, 3, 4, 5, 6, 7]) == 6
    assert manager.table("c")[:2] == [0, 1]
    manager.truncate("c", 6)
    with pytest.raises(ValueError, match=r"truncate: num_tokens must lie in \[6, 6\]"):
        manager.truncate("c", 5)
