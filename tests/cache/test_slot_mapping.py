"""slot_mapping: values, refusals, opcheck, reference, replay; compile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck

from llamatelemetry.ops import reference, slot_mapping

PAGE_SIZE = 4


def random_case(device, counts=(3, 1, 5), max_blocks=4, page_size=PAGE_SIZE):
    """Positions anywhere in a shuffled table, whose rows are those of a wider one."""
    num_tokens, batch = sum(counts), len(counts)
    positions = torch.randint(max(max_blocks * page_size, 1), (num_tokens,), device=device)
    wide = torch.full((batch, max_blocks + 3), 10**6, dtype=torch.int32, device=device)
    table = wide[:, :max_blocks]
    table.copy_(torch.randperm(batch * max_blocks).view(batch, max_blocks))
    starts = torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32)
    return positions, table, starts, page_size


def assert_same(positions, table, starts, page_size):
    slots = slot_mapping(positions, table, starts, page_size)
    assert slots.dtype == torch.int64
    assert torch.equal(slots, reference.slot_mapping(positions, table, starts, page_size))


@pytest.mark.parametrize("counts", [(), (0,), (1,), (1,) * 70, (300, 0, 0, 7), (0, 2)])
@pytest.mark.parametrize("page_size", [1, 16, 7])
def test_values(device, counts, page_size):
    assert_same(*random_case(device, counts, page_size=page_size))


@given(st.lists(st.integers(0, 5), max_size=5), st.integers(0, 4), st.integers(1, 5))
def test_any_sizes(counts, max_blocks, page_size):
    assert_same(*random_case("cpu", counts, max_blocks, page_size))


def test_what_has_no_block_gets_none(device):
    table = torch.tensor([[5, -1], [2**31 - 1, 0]], dtype=torch.int32, device=device)
    starts = torch.tensor([1, 4, 8], dtype=torch.int32, device=device)
    positions = torch.tensor([0, 3, 4, -1, 2, 8, 2**62, -(2**63), 0], device=device)
    slots = slot_mapping(positions, table, starts, PAGE_SIZE)
    # The first and the last token belong to no sequence; the third meets a table's -1.
    large = (2**31 - 1) * PAGE_SIZE + 2  # past 32 bits
    assert slots.tolist() == [-1, 23, -1, -1, large, -1, -1, -1, -1]
    positions, table, starts, page_size = random_case(device)
    broken = torch.tensor([-5, 2**31 - 1, -(2**31), 10**6], dtype=torch.int32, device=device)
    slot_mapping(positions, table, broken, page_size)  # reads nothing outside its arguments


def test_refusals(device):
    positions, table, starts, page_size = random_case(device)

    def refuses(*parts, positions=positions, table=table, starts=starts, page_size=page_size):
        assert_refuses(
            lambda: slot_mapping(positions, table, starts, page_size), "slot_mapping: ", *parts
        )

    refuses("positions must be [num_tokens], got shape [1, 9]", positions=positions[None])
    refuses("positions must be int64, got int32", positions=positions.int())
    refuses("positions must be contiguous", positions=positions.repeat_interleave(2)[::2])
    refuses("block_table must be [batch, max_blocks], got shape [4]", table=table[0])
    refuses("block_table must be int32, got int64", table=table.long())
    refuses("block_table must have a contiguous last dimension", table=table.T.contiguous().T)
    refuses("cu_seqlens_q must be [batch + 1] = [4], got shape [3]", starts=starts[1:])
    refuses("cu_seqlens_q must be int32, got int64", starts=starts.long())
    refuses("page_size must be at least 1, got 0", page_size=0)


def test_opcheck(device):
    run_opcheck("slot_mapping", *random_case(device))
    run_opcheck("slot_mapping", *random_case(device, ()))


def test_is_torch_gather(device):
    positions, table, starts, page_size = random_case(device, (4, 4, 4))
    blocks = table.long().gather(1, positions.view(3, 4) // page_size)
    expected = blocks * page_size + positions.view(3, 4) % page_size
    assert torch.equal(slot_mapping(positions, table, starts, page_size).view(3, 4), expected)


def test_replay(device):
    assert_replays(slot_mapping, random_case(device, (3, 1, 5)), random_case(device, (1, 7, 1)))


def test_compile(device):
    assert_compiles(slot_mapping, [random_case(device, (n, n + 1)) for n in (3, 5, 9)])
