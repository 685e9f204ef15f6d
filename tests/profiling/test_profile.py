"""profile_model and check_memory measure what there is."""

from __future__ import annotations

import mmap
import time

import pytest
import torch
from torch import nn

from llamatelemetry.ops import rms_norm
from llamatelemetry.profiling import check_memory, profile_model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls, self.seconds = nn.Linear(256, 256), 0, 0.0

    def forward(self, x, scale=1.0):
        self.calls += 1
        time.sleep(self.seconds)
        return rms_norm(self.linear(self.linear(x)), self.linear.bias.detach()) * scale


def net(device):
    return Net().to(device).eval()


@pytest.mark.parametrize("pack", [lambda x: x, lambda x: (x, 2.0), lambda x: {"x": x, "scale": 2}])
def test_every_forward_counts(device, pack):
    model, x = net(device), torch.randn(64, 256, device=device)
    found = profile_model(model, pack(x), warmup=2, active=4)
    assert model.calls == 2 + 4 + 1
    assert len(found.latencies_ms) == 4
    assert all(ms > 0 for ms in found.latencies_ms)
    assert found.device == str(x.device)
    assert (found.peak_bytes is None) == (device.type == "cpu")


def test_latency_is_the_wall_clocks(device):
    model = net(device)
    model.seconds = 0.02
    found = profile_model(model, torch.randn(1, 256, device=device), warmup=0, active=3)
    assert 20 <= found.median_ms < 200


def test_ops_are_named_counted_and_shared_out(device):
    found = profile_model(net(device), torch.randn(64, 256, device=device))
    calls = {op.name: op.calls for op in found.ops}
    assert calls["aten::addmm"] == 2
    assert calls["llamatelemetry::rms_norm"] == 1
    assert sum(op.share for op in found.ops) == pytest.approx(1)
    assert [op.us for op in found.ops] == sorted((op.us for op in found.ops), reverse=True)
    lines = found.table(rows=2).splitlines()
    assert len(lines) == 3
    assert found.ops[0].name in lines[1]


def test_gradients_are_off_and_counts_are_checked():
    with torch.inference_mode(False), torch.enable_grad():
        model = net("cpu")
        profile_model(model, torch.randn(2, 256), warmup=0, active=1)
    with pytest.raises(ValueError, match="warmup must be >= 0 and active >= 1, got 3 and 0"):
        profile_model(model, torch.randn(2, 256), active=0)


def test_check_memory_sees_an_allocation(device):
    def of_device():
        return next(m for m in check_memory() if m.device.startswith(device.type))

    before = of_device()
    if device.type == "cpu":  # an allocator may hand out memory that the process already holds
        block = mmap.mmap(-1, 64 << 20)
        block[::4096] = b"1" * (len(block) // 4096)
    else:
        block = torch.ones(64 << 20, dtype=torch.uint8, device=device)
    after = of_device()
    assert after.allocated - before.allocated >= 60 << 20
    assert after.peak >= after.allocated
    assert after.reserved >= after.allocated
    assert 0 < after.free < after.total
    assert len(block) == 64 << 20
    assert device.type in str(after)
    assert "GiB in use" in str(after)
