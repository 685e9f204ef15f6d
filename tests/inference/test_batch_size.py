"""How many sequences fit: the estimate's figures and order, and the search's limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from llamatelemetry.inference import search_batch_size, suggest_batch_size
from llamatelemetry.inference.batch_size import _in_use

sizes = st.floats(0.05, 500.0)
bits = st.sampled_from([2.0, 4.0, 4.5, 8.0, 16.0, 32.0])
memory = st.floats(0.1, 1000.0)


def test_figures_of_the_guide():
    """A T4 of 16 GB."""
    assert suggest_batch_size(7.0, 4, 16.0) == 4
    assert [suggest_batch_size(1.0, bits, 16.0) for bits in (4, 8, 16)] == [8, 8, 8]
    assert suggest_batch_size(70.0, 16, 16.0) == 1
    assert suggest_batch_size(7.0, 4, 16.0, context_length=512) == 16


@given(sizes, bits, memory)
def test_powers_of_two_in_the_right_order(size, bits, gb):
    found = suggest_batch_size(size, bits, gb)
    assert found >= 1
    assert found & (found - 1) == 0
    assert suggest_batch_size(size, bits, 2 * gb) >= found
    assert suggest_batch_size(2 * size, bits, gb) <= found
    assert suggest_batch_size(size, 2 * bits, gb) <= found
    assert suggest_batch_size(size, bits, gb, context_length=4096) <= found


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), float("inf"), "7", True])
@pytest.mark.parametrize("position", range(3))
def test_refusals(bad, position):
    given = [7.0, 4, 16.0]
    given[position] = bad
    name = ("model_size_b", "bits", "available_vram_gb")[position]
    with pytest.raises(ValueError, match=f"suggest_batch_size: {name} must be"):
        suggest_batch_size(*given)
    with pytest.raises(ValueError, match="context_length must be"):
        suggest_batch_size(7.0, 4, 16.0, context_length=0)


class Widening(nn.Module):
    """A forward of 1 MiB a row, that notes its batches."""

    def __init__(self, device):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, device=device), requires_grad=False)
        self.batches = []

    def forward(self, x):
        self.batches.append(len(x))
        return (x * self.weight).expand(-1, 1 << 18).contiguous()


def test_search_on_this_machine(device):
    with torch.inference_mode(False):
        model = Widening(device)

    def inputs(batch):
        return torch.ones(batch, 1, device=device)

    assert search_batch_size(model, inputs, max_batch_size=4) == 4
    assert model.batches == [1, 2, 4]
    in_use, total = _in_use(device)
    assert 0 < in_use < total
    with pytest.raises(RuntimeError, match="one row must stay within"):
        search_batch_size(model, inputs, available_bytes=in_use // 2)


def test_search_stops_at_the_share(monkeypatch):
    """With 100 MiB, of which 10 are in use: 80 more within 90 %."""
    from llamatelemetry.inference import batch_size

    monkeypatch.setattr(batch_size, "_in_use", lambda device: (10 << 20, 100 << 20))
    model = Widening("cpu")

    def inputs(batch):
        return torch.ones(batch, 1)

    assert search_batch_size(model, inputs) == 64
    assert model.batches == [1, 2, 4, 8, 16, 32, 64]
    model.batches.clear()
    assert search_batch_size(model, inputs, share=0.4) == 16  # 30 MiB more: 32 are not tried
    assert model.batches == [1, 2, 4, 8, 16]
    assert search_batch_size(model, inputs, max_batch_size=5) == 4


def test_search_takes_out_of_memory_for_an_answer(monkeypatch):
    model = Widening("cpu")
    forward = model.forward

    def limited(x):
        if len(x) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return forward(x)

    monkeypatch.setattr(model, "forward", limited)
    assert search_batch_size(model, lambda batch: torch.ones(batch, 1)) == 4
    assert model(torch.ones(2, 1)).shape == (2, 1 << 18)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_batch_size": 0}, "max_batch_size"), ({"share": 0}, "share"), ({"share": 1.5}, "share")],
)
def test_search_refusals(options, message):
    with pytest.raises(ValueError, match=f"search_batch_size: {message} must be"):
        search_batch_size(nn.Identity(), torch.ones, **options)
