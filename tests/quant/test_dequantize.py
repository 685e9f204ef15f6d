"""dequantize: values, refusals, opcheck, reference, replay; compile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck

from llamatelemetry._native.facts import FORMATS
from llamatelemetry.ops import QuantFormat, dequantize, reference
from llamatelemetry.ops.formats import GGUF_FORMATS


@pytest.fixture(params=list(QuantFormat), ids=lambda f: f.name)
def format(request):
    return request.param


def random_blocks(format, *shape, device="cpu"):
    """Every bit random, so scales are negative, subnormal, inf and NaN now and then.

    shape: [..., blocks of a row]; the result is [..., row_bytes]."""
    size = (*shape[:-1], shape[-1] * format.block_bytes)
    return torch.randint(0, 256, size, dtype=torch.uint8, device=device)


def gguf_dequantize(data, format):
    with np.errstate(all="ignore"):
        weights = quants.dequantize(
            data.cpu().contiguous().numpy(), GGMLQuantizationType[format.name]
        )
    return torch.from_numpy(weights).to(data.device)


def assert_same_bits(ours, theirs):
    """Equal to the sign of zero; NaNs in the same places, whatever their payload."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours.isnan(), theirs.isnan())
    integers = torch.int32 if ours.dtype == torch.float32 else torch.int16
    assert torch.equal(
        ours.nan_to_num(0.0, torch.inf, -torch.inf).view(integers),
        theirs.nan_to_num(0.0, torch.inf, -torch.inf).view(integers),
    )


@pytest.mark.parametrize("shape", [(1,), (3, 2), (2, 2, 5), (64, 9)])
def test_values(device, format, dtype, shape):
    data = random_blocks(format, *shape, device=device)
    assert_same_bits(dequantize(data, format, dtype), gguf_dequantize(data, format).to(dtype))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_empty(device, format, dtype, shape):
    weights = dequantize(random_blocks(format, *shape, device=device), format, dtype)
    assert weights.shape == (*shape[:-1], shape[-1] * format.block_size)
    assert weights.dtype == dtype


def test_every_scale(device, format):
    """All 65,536 bit patterns of the block's float16s; of an exponent its 256."""
    data = random_blocks(format, 65536, 1)
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(-1, 1).view(torch.uint8)
    for field in {"scale", "min"} & format.facts.fields.keys():
        offset, size = format.facts.fields[field]
        data[:, offset : offset + size] = patterns[:, :size]
    data = data.to(device)
    assert_same_bits(dequantize(data, format), gguf_dequantize(data, format))


def test_strided_rows_and_odd_offsets(device, format):
    data = random_blocks(format, 4, 3)
    row_bytes = data.shape[1]
    flat = torch.full((1 + 4 * (row_bytes + 7),), 0xFF, dtype=torch.uint8, device=device)
    view = flat[1:].view(4, row_bytes + 7)[:, :row_bytes]
    view.copy_(data)
    assert_same_bits(dequantize(view, format), gguf_dequantize(data.to(device), format))


def test_block_table_is_gguf_s(format):
    number = GGMLQuantizationType[format.name]
    assert GGML_QUANT_SIZES[number] == (format.block_size, format.block_bytes)
    assert GGUF_FORMATS[number] is QuantFormat(number) is QuantFormat[format.name] is format


def test_every_format_of_the_library_has_a_member():
    blocks = [name for name, facts in FORMATS.items() if facts.scale_rule != "group"]
    assert [format.value for format in QuantFormat] == blocks


def test_refusals(device):
    data = torch.zeros(2, 36, dtype=torch.uint8, device=device)
    assert_refuses(
        lambda: dequantize(data, 3), "data must have rows of whole Q4_1 blocks of 20", "[2, 36]"
    )
    assert_refuses(lambda: dequantize(data, 5), "format must be one of {Q4_0, Q4_1,", "got 5")
    assert_refuses(lambda: dequantize(data, 2, perm=data), "perm must be None for Q4_0", "[2, 36]")
    assert_refuses(lambda: dequantize(data.char(), 2), "data must be uint8", "int8")
    assert_refuses(lambda: dequantize(data, 2, torch.float64), "dtype must be float32", "float64")
    assert_refuses(lambda: dequantize(data.T, 2), "data must have a contiguous last dimension")


def test_opcheck(device, format, dtype):
    for num_rows in (3, 0):
        data = random_blocks(format, num_rows, 2, device=device) & 0x3F  # opcheck dislikes NaN
        run_opcheck("dequantize", data, format.value, dtype)


def test_reference(device, format):
    """The oracle of later tests says what gguf says."""
    data = random_blocks(format, 6, 2, device=device)
    theirs = gguf_dequantize(data, format)
    ours = reference.dequantize(data, format)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


def test_replay(device, format, dtype):
    cases = [(random_blocks(format, 4, 2, device=device),) for _ in range(2)]
    assert_replays(lambda data: dequantize(data, format, dtype), *cases)


def test_compile(device):
    inputs = [(random_blocks(QuantFormat.Q4_0, n, 2, device=device),) for n in (2, 5, 9)]
    for format in (2, "Q4_0", QuantFormat.Q4_0):
        assert_compiles(lambda data, format=format: dequantize(data, format), inputs)
