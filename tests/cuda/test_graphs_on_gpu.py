"""What only a GPU shows of graphs: memory, devices, threads, and captures that fail."""

from __future__ import annotations

import threading

import pytest
import torch

from llamatelemetry.cuda import CUDAGraph, GraphCaptureConfig, GraphPool

pytestmark = pytest.mark.gpu


def test_every_field_of_the_config_is_honoured(monkeypatch):
    """Two of them were ignored."""
    seen = {}
    begin = torch.cuda.CUDAGraph.capture_begin

    def capture_begin(self, pool=None, capture_error_mode="global", **kwargs):
        seen.update(pool=pool, mode=capture_error_mode)
        return begin(self, pool, capture_error_mode=capture_error_mode, **kwargs)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", capture_begin)
    x, handle = torch.ones(2, device="cuda"), torch.cuda.graph_pool_handle()
    CUDAGraph(GraphCaptureConfig(handle, "relaxed", 0)).capture(lambda: x + 1)
    assert seen == {"pool": handle, "mode": "relaxed"}


def test_a_pool_gives_its_memory_back():
    x = torch.ones(1 << 20, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    pool = GraphPool()
    for i in range(4):
        pool.capture(f"g{i}", lambda: (x * 2 + 1) * 3)
    assert torch.cuda.memory_reserved() > before
    pool.clear()
    assert torch.cuda.memory_reserved() <= before


def test_graphs_of_a_pool_share_memory():
    x = torch.ones(1 << 22, device="cuda")  # 16 MiB

    def scratch():
        return ((x * 2 + 1) * 3 - x).sum()

    def reserved(count):
        pool = GraphPool()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        for i in range(count):
            pool.capture(f"g{i}", scratch)
        used = torch.cuda.memory_reserved() - before
        pool.clear()
        return used

    assert reserved(4) <= reserved(1) + (4 << 20)


def test_an_output_stays_until_its_own_graph_is_replayed():
    """A later graph's output may lie in the scratch memory of an earlier one."""
    x, pool = torch.ones(1 << 20, device="cuda"), GraphPool()
    pool.capture("first", lambda: ((x * 2 + 1) * 3 - x).sum())
    pool.capture("second", lambda: {"y": x + 1})
    y = pool.replay("second")["y"]
    pool.replay("first")
    assert torch.equal(y, x + 1)
    x.add_(1)
    assert pool.replay("second")["y"] is y
    assert torch.equal(y, x + 1)


def test_an_empty_capture_is_an_error():
    graph, x = CUDAGraph(), torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="the captured work must use cuda:0, got no work"):
        graph.capture(lambda: x)
    assert not graph.is_captured()
    assert graph.capture(lambda: x + 1).tolist() == [2.0, 2.0]


def test_what_a_graph_cannot_hold_is_refused_and_the_next_capture_works():
    graph, x = CUDAGraph(), torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError):
        graph.capture(lambda: x * x.sum().item())
    assert not graph.is_captured()
    assert torch.rand(4, device="cuda").unique().numel() > 1  # its generator is not captured
    assert graph.capture(lambda: x + 1).tolist() == [2.0, 2.0]
    assert (torch.ones(1 << 20, device="cuda") * 2).sum().item() == 2 << 20


def test_capture_is_on_the_device_of_the_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, weight = torch.randn(8, 8, device="cuda:1"), torch.randn(8, 8, device="cuda:1")
    with torch.cuda.device(0):
        graph = CUDAGraph()
        graph.capture(lambda x: x @ weight, {"x": x})
        new = torch.randn_like(x)
        assert torch.equal(graph.replay(x=new), new @ weight)
        assert torch.cuda.current_device() == 0


def test_another_thread_may_allocate_meanwhile():
    x, stop = torch.ones(64, device="cuda"), threading.Event()

    def allocate():
        while not stop.is_set():
            torch.empty(1 << 12, device="cuda")

    thread = threading.Thread(target=allocate)
    thread.start()
    try:
        for _ in range(20):
            assert CUDAGraph().capture(lambda: x + 1)[0].item() == 2.0
    finally:
        stop.set()
        thread.join()
