"""quant_embedding: values, refusals, opcheck, reference, replay; compile."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType, quants
from gguf_rows import gguf_rows
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck

from llamatelemetry.ops import QuantFormat, quant_embedding, reference, repack


@pytest.fixture(params=list(QuantFormat), ids=lambda f: f.name)
def format(request):
    return request.param


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("shape", [(1,), (2, 3), (), (0,), (300,)])
def test_values(device, dtype, format, shape, integer):
    data = gguf_rows(format, 37, 768, device)
    weights = quants.dequantize(data.cpu().numpy(), GGMLQuantizationType[format.name])
    ids = torch.randint(0, 37, shape, dtype=integer, device=device)
    ours = quant_embedding(ids, repack(data, format), format, 37, 768, dtype)
    assert torch.equal(ours, torch.from_numpy(weights).to(device)[ids.long()].to(dtype))


def test_ids_outside_give_zeros(device, format):
    data = gguf_rows(format, 20, 256, device)
    ids = torch.tensor([-1, 19, 20, 31, 2**40, -(2**62), 0], device=device)
    ours = quant_embedding(ids, repack(data, format), format, 20, 256)
    assert torch.equal(ours, reference.quant_embedding(ids, data, format))
    assert not ours[[0, 2, 3, 4, 5]].any()


def test_refusals(device):
    packed = repack(gguf_rows(QuantFormat.Q8_0, 20, 64, device), "Q8_0")
    ids = torch.tensor([1, 2], device=device)
    assert_refuses(lambda: quant_embedding(ids, packed, 5, 20, 64), "format must be", "got 5")
    assert_refuses(
        lambda: quant_embedding(ids, packed, 8, 20, 64, zeros=packed), "zeros must be None for Q8_0"
    )
    assert_refuses(lambda: quant_embedding(ids.float(), packed, 8, 20, 64), "ids must be int64")
    assert_refuses(lambda: quant_embedding(ids, packed, 8, 20, 96), "packed must be", "[2, 1632]")
    assert_refuses(lambda: quant_embedding(ids, packed, 8, 40, 64), "packed must be", "[3, 1088]")
    assert_refuses(lambda: quant_embedding(ids, packed, 8, 20, 80), "k must be a multiple of 32")
    assert_refuses(
        lambda: quant_embedding(ids, packed, 8, 20, 64, torch.float64), "dtype must be float32"
    )
    pairs = torch.zeros(3, 2, dtype=torch.int64, device=device)
    assert_refuses(lambda: quant_embedding(pairs[:, 0], packed, 8, 20, 64), "ids must be contig")


def test_opcheck(device, dtype, format):
    packed = repack(gguf_rows(format, 20, 256, device), format)
    ids = torch.tensor([[0, 3], [19, 7]], device=device)
    run_opcheck("quant_embedding", ids, packed, format.value, 20, 256, dtype)
    run_opcheck("quant_embedding", ids[:0], packed, format.value, 20, 256, dtype)


def test_reference(device, format):
    """The oracle is torch's embedding over the dequantised table."""
    data = gguf_rows(format, 20, 256, device)
    ids = torch.tensor([3, 3, 19], device=device)
    weight = reference.dequantize(data, format)
    theirs = torch.nn.functional.embedding(ids, weight)
    assert torch.equal(reference.quant_embedding(ids, data, format), theirs)


def test_replay(device, dtype):
    def case():
        packed = repack(gguf_rows(QuantFormat.Q8_0, 50, 96, device), "Q8_0")
        return torch.randint(0, 50, (2, 3), device=device), packed

    assert_replays(lambda i, w: quant_embedding(i, w, "Q8_0", 50, 96, dtype), case(), case())


def test_compile(device):
    packed = repack(gguf_rows(QuantFormat.Q8_0, 50, 96, device), "Q8_0")
    assert_compiles(
        lambda ids: quant_embedding(ids, packed, "Q8_0", 50, 96),
        [(torch.randint(0, 50, (n,), device=device),) for n in (2, 5, 9)],
    )
