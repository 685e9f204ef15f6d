"""advance_step_: values, refusals, opcheck, reference, replay; compile."""

from __future__ import annotations

import pytest
import torch
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck

from llamatelemetry.ops import advance_step_, reference

NAMES = (
    "input_ids",
    "positions",
    "slot_mapping",
    "cache_seqlens",
    "offsets",
    "next_ids",
    "active",
    "block_table",
    "page_size",
)


def random_case(device, batch=5, max_blocks=3, page_size=4):
    """Rows anywhere in a shuffled table, its end included; about one in three stands still."""
    ids, next_ids, slots = torch.randint(1000, (3, batch), device=device)
    positions = torch.randint(max_blocks * page_size, (batch,), device=device)
    wide = torch.full((batch, max_blocks + 2), 10**6, dtype=torch.int32, device=device)
    table = wide[:, :max_blocks]
    table.copy_(torch.randperm(batch * max_blocks).view(batch, max_blocks))
    active = torch.rand(batch, device=device) < 0.7
    lengths, offsets = positions.int() + 1, torch.randint(2**62, (batch,), device=device)
    return ids, positions, slots, lengths, offsets, next_ids, active, table, page_size


def assert_same(args):
    expected = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
    reference.advance_step_(*expected)
    advance_step_(*args)
    for name, ours, wanted in zip(NAMES[:8], args, expected, strict=False):
        assert torch.equal(ours, wanted), name


@pytest.mark.parametrize("batch", [0, 1, 3, 300])
@pytest.mark.parametrize(("max_blocks", "page_size"), [(1, 1), (4, 16), (5, 7), (0, 4)])
def test_values(device, batch, max_blocks, page_size):
    args = random_case(device, batch, max(max_blocks, 1), page_size)
    assert_same((*args[:7], args[7][:, :max_blocks], page_size))


def test_a_walk_through_the_pages(device):
    table = torch.tensor([[7, 2], [3, -1]], dtype=torch.int32, device=device)
    ids, positions, slots, offsets = torch.zeros(4, 2, dtype=torch.int64, device=device)
    lengths = torch.ones(2, dtype=torch.int32, device=device)
    active = torch.tensor([True, True], device=device)
    seen = []
    for step in range(5):
        if step == 3:
            active[0] = False
        drawn = torch.tensor([10 + step, 20 + step], device=device)
        advance_step_(ids, positions, slots, lengths, offsets, drawn, active, table, 2)
        seen.append(slots.tolist())
    # Row 0 crosses into block 2, is stopped and writes no more; row 1 runs out of blocks and stays.
    assert seen == [[15, 7], [4, -1], [5, -1], [-1, -1], [-1, -1]]
    assert ids.tolist() == [12, 20]
    assert positions.tolist() == offsets.tolist() == [3, 1]
    assert lengths.tolist() == [4, 2]
    active[0] = True
    table[0, 1] = 2**31 - 1
    positions[0] = 2
    advance_step_(ids, positions, slots, lengths, offsets, drawn, active, table, 2)
    assert slots[0] == (2**31 - 1) * 2 + 1  # past 32 bits; a row that comes back has its own slot


def test_refusals(device):
    args = random_case(device)

    def refuses(*parts, **changed):
        given = [changed.get(name, arg) for name, arg in zip(NAMES, args, strict=True)]
        assert_refuses(lambda: advance_step_(*given), "advance_step_: ", *parts)

    for name, arg in zip(NAMES[:7], args, strict=False):
        dtype = str(arg.dtype)[6:]
        shape = f"{name} must be [batch] as block_table = [5], got shape [4]"
        refuses(shape, **{name: arg[1:].clone()})
        refuses(f"{name} must be {dtype}, got int16", **{name: arg.short()})
        refuses(f"{name} must be contiguous", **{name: arg.repeat_interleave(2)[::2]})
    table = args[7]
    refuses("block_table must be [batch, max_blocks], got shape [3]", block_table=table[0])
    refuses("block_table must be int32, got int64", block_table=table.long())
    refuses("block_table must have a contiguous last dimension", block_table=table.T.contiguous().T)
    refuses("page_size must be at least 1, got -1", page_size=-1)


def test_opcheck(device):
    run_opcheck("advance_step_", *random_case(device))
    run_opcheck("advance_step_", *random_case(device, 0))


def test_is_torch_add(device):
    args = random_case(device)
    ids, positions, slots, lengths, offsets, next_ids, _, table, page_size = args
    positions.clamp_(max=2 * page_size)  # the next position is in the table
    after = positions + 1
    blocks = table.long().gather(1, (after // page_size)[:, None])[:, 0]
    expected = next_ids, after, blocks * page_size + after % page_size, lengths + 1, offsets + 1
    expected = [x.clone() for x in expected]
    advance_step_(*args[:6], torch.ones_like(args[6]), table, page_size)
    for ours, wanted in zip((ids, positions, slots, lengths, offsets), expected, strict=True):
        assert torch.equal(ours, wanted)


def test_replay(device):
    assert_replays(advance_step_, random_case(device), random_case(device))


def test_compile(device):
    assert_compiles(advance_step_, [random_case(device, n) for n in (2, 5, 9)])
