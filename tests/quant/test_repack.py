"""repack and unpack: values, refusals, opcheck, reference, replay; compile."""

from __future__ import annotations

import pytest
import torch
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck

from llamatelemetry.ops import QuantFormat, reference, repack, unpack


@pytest.fixture(params=list(QuantFormat), ids=lambda f: f.name)
def format(request):
    return request.param


def random_rows(format, n, num_blocks, device):
    """[n, row_bytes], every bit random, and k."""
    k = num_blocks * format.block_size
    shape = (n, format.row_bytes(k))
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device), k


@pytest.mark.parametrize(("n", "num_blocks"), [(16, 1), (1, 3), (35, 2), (64, 5), (0, 2), (3, 0)])
def test_values(device, format, n, num_blocks):
    data, k = random_rows(format, n, num_blocks, device)
    packed = repack(data, format)
    assert torch.equal(packed, reference.repack(data, format))
    assert torch.equal(unpack(packed, format, n, k), data)


def test_strided_rows(device, format):
    data, k = random_rows(format, 19, 2, device)
    wide = torch.full((19, data.shape[1] + 3), 0xFF, dtype=torch.uint8, device=device)
    wide[:, 1:-2] = data
    assert torch.equal(unpack(repack(wide[:, 1:-2], format), format, 19, k), data)


def test_format_names(device):
    data, k = random_rows(QuantFormat.Q4_1, 16, 2, device)
    packed = repack(data, "Q4_1")
    assert torch.equal(packed, repack(data, 3))
    assert torch.equal(unpack(packed, "Q4_1", 16, k), data)


def test_refusals(device):
    data, _ = random_rows(QuantFormat.Q4_1, 16, 2, device)
    packed = repack(data, "Q4_1")
    assert_refuses(lambda: repack(data, 5), "format must be one of {Q4_0, Q4_1,", "got 5")
    assert_refuses(lambda: repack(data, "Q4_2"), "format must be one of {Q4_0,", "got Q4_2")
    assert_refuses(
        lambda: repack(data, "Q4_1", "rows8"), "layout must be one of {rows16}, got rows8"
    )
    assert_refuses(lambda: unpack(packed, 3, 16, 64, "rows8"), "layout must be one of {rows16}")
    assert_refuses(lambda: repack(data, "Q4_0"), "data must have rows of whole Q4_0 blocks of 18")
    assert_refuses(lambda: repack(data.char(), 3), "data must be uint8", "int8")
    assert_refuses(lambda: repack(data[0], 3), "data must be [n, row_bytes]", "[40]")
    assert_refuses(lambda: unpack(packed, 5, 16, 64), "format must be one of", "got 5")
    assert_refuses(lambda: unpack(packed, 3, 17, 64), "packed must be", "[2, 640]", "[1, 640]")
    assert_refuses(lambda: unpack(packed, 3, 16, 48), "k must be a multiple of 32 for Q4_1", "48")
    assert_refuses(lambda: unpack(packed, "Q4_K", 16, 64), "k must be a multiple of 256 for Q4_K")
    assert_refuses(lambda: unpack(packed, 3, -1, 64), "n must be at least 0, got -1")
    assert_refuses(lambda: unpack(packed.char(), 3, 16, 64), "packed must be uint8")
    assert_refuses(lambda: unpack(packed.T, 3, 640 * 16, 64), "packed must be")
    offset = torch.zeros(641, dtype=torch.uint8, device=device)[1:].view(1, 640)
    assert_refuses(lambda: unpack(offset, 3, 16, 64), "packed must start at a multiple of 16", "1")


def test_opcheck(device, format):
    data, k = random_rows(format, 18, 2, device)
    run_opcheck("repack", data, format.value)
    run_opcheck("unpack", repack(data, format), format.value, 18, k)
    run_opcheck("repack", data[:0], format.value)


def test_reference(device):
    """Row 1 of a tile of Q8_0: its scale and its codes stand where the layout says."""
    data, _ = random_rows(QuantFormat.Q8_0, 16, 1, device)
    packed = reference.repack(data, QuantFormat.Q8_0)
    assert torch.equal(packed[0, 512 + 2 : 512 + 4], data[1, :2])
    assert torch.equal(packed[0, 64 + 4 : 64 + 8], data[1, 2 + 4 : 2 + 8])


def test_replay(device, format):
    cases = [(random_rows(format, 20, 2, device)[0],) for _ in range(2)]
    k = 2 * format.block_size
    assert_replays(lambda data: repack(data, format), *cases)
    packed = [(repack(data, format),) for (data,) in cases]
    assert_replays(lambda tiles: unpack(tiles, format, 20, k), *packed)


def test_compile(device):
    inputs = [random_rows(QuantFormat.Q4_1, n, 2, device)[:1] for n in (20, 33, 64)]
    assert_compiles(lambda data: repack(data, QuantFormat.Q4_1), inputs)
    packed = [(repack(*data, "Q4_1"),) for data in inputs]
    assert_compiles(lambda tiles: unpack(tiles, "Q4_1", 20, 64), packed[:1] * 3)  # n, k are static
