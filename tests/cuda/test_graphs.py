"""Graphs: what they return, refill, refuse and free. On the CPU the same calls run eagerly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llamatelemetry.cuda import (
    CUDAGraph,
    GraphPool,
    capture_graph,
    replay_graph,
)
from llamatelemetry.ops import append_kv_, rms_norm

pytestmark = pytest.mark.filterwarnings("ignore:.*no CUDA device holds")


def is_graph(device):
    return device.type == "cuda"


def test_capture_returns_valid_outputs_at_once(device):
    """They were garbage until the first replay."""
    x = torch.randn(4, 8, device=device)
    graph = CUDAGraph()
    out = graph.capture(lambda: x * 2 + 1)
    assert torch.equal(out, x * 2 + 1)
    assert graph.is_captured() is is_graph(device)


@pytest.mark.parametrize(
    ("result", "kind"),
    [
        (lambda x: x + 1, torch.Tensor),
        (lambda x: (x + 1, x * 2), tuple),
        (lambda x: [x + 1, [x * 2]], list),
        (lambda x: {"a": x + 1, "b": (x * 2, None, 3)}, dict),
    ],
)
def test_replay_returns_what_the_function_returned(device, result, kind):
    """Tuples came back as dicts."""
    x = torch.randn(3, device=device)
    graph = CUDAGraph()
    graph.capture(result, {"x": x})
    new = torch.randn(3, device=device)
    out = graph.replay(x=new)
    assert type(out) is kind
    torch.testing.assert_close(out, result(new), rtol=0, atol=0)


def test_a_replay_overwrites_the_outputs_of_the_capture(device):
    x = torch.zeros(5, device=device)
    graph = CUDAGraph()
    out = graph.capture(lambda x: x + 1, {"x": x})
    graph.replay(x=torch.full_like(x, 6.0))
    assert torch.equal(out, torch.full_like(x, 7.0))


def test_inputs_are_buffers_that_the_caller_may_fill_too(device):
    inputs = {"x": torch.zeros(5, device=device), "scale": 3}
    graph = CUDAGraph()
    graph.capture(lambda x, scale: x * scale, inputs)
    inputs["x"].fill_(2.0)
    assert graph.replay().tolist() == [6.0] * 5
    graph.update_inputs(x=torch.ones(5))  # from the CPU, too
    assert graph.replay(scale=3).tolist() == [3.0] * 5


def test_a_function_without_parameters_reads_its_inputs_as_variables(device):
    x = torch.ones(2, device=device)
    graph = CUDAGraph()
    graph.capture(lambda: x * 5, {"x": x})
    assert graph.replay(x=torch.tensor([1.0, 2.0], device=device)).tolist() == [5.0, 10.0]


@pytest.mark.parametrize(
    ("new", "error", "parts"),
    [
        ({"x": torch.zeros(6)}, ValueError, ("input x", "shape", "(5,)", "(6,)")),
        ({"x": torch.zeros(5).double()}, ValueError, ("input x", "dtype", "float32", "float64")),
        ({"x": 1.0}, ValueError, ("input x", "Tensor", "float")),
        ({"y": torch.zeros(5)}, KeyError, ("['scale', 'x']", "'y'")),
        ({"scale": 4}, ValueError, ("input scale", "4", "capture again")),
    ],
)
def test_refilling_refuses_by_name_and_changes_nothing(device, new, error, parts):
    x = torch.ones(5, device=device)
    graph = CUDAGraph()
    graph.capture(lambda x, scale: x * scale, {"x": x, "scale": 3})
    with pytest.raises(error) as caught:
        graph.replay(**new)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert torch.equal(graph.replay(), torch.full_like(x, 3.0))


def test_context_manager_captures_its_body(device, request):
    """It crashed on CUDA."""
    if device.type == "cpu":
        request.getfixturevalue("no_cuda")
    x = torch.randn(4, 4, device=device)
    weight = torch.randn(4, 4, device=device)
    (x @ weight).relu_()  # cuBLAS makes its workspace before a capture
    graph = CUDAGraph()
    with graph.capture() as same:
        y = torch.zeros_like(x)
        y.add_(x @ weight)
        rows = y.relu_()[1:].t()
        total = rows.sum()
    assert same is graph
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        assert graph.replay() is None
        expected = (x @ weight).relu_()
        assert torch.equal(rows, expected[1:].t())
        torch.testing.assert_close(total, expected[1:].sum())


def test_on_the_cpu_our_ops_are_replayed_from_a_recording(no_cuda):
    x, weight = torch.randn(8, 64), torch.rand(64) + 0.5
    graph = CUDAGraph()
    calls = []

    def norm(x):
        calls.append(1)
        return rms_norm(rms_norm(x, weight), weight)

    out = graph.capture(norm, {"x": x})
    new = torch.randn(8, 64)
    assert graph.replay(x=new) is out
    assert torch.equal(out, rms_norm(rms_norm(new, weight), weight))
    assert len(calls) == 1
    with graph.capture():
        block = rms_norm(x, weight)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(block, rms_norm(x, weight))


def test_a_recorded_function_keeps_the_tensors_that_it_made(no_cuda):
    """A replay wrote into whatever had their memory by then."""
    x, weight = torch.randn(1, 2, 64), torch.ones(128)
    slots = torch.zeros(1, dtype=torch.int64)

    def step():
        k, v = torch.empty(1, 64, 2, 64), torch.empty(1, 64, 2, 64)
        append_kv_(x, x, k, v, slots)
        return rms_norm(k.view(64, 128), weight)

    graph = CUDAGraph()
    out = graph.capture(step)
    others = [torch.zeros(1, 64, 2, 64) for _ in range(50)]
    x.fill_(3.0)
    graph.replay()
    assert not any(other.any() for other in others)
    assert torch.equal(out[0], rms_norm(x.view(1, 128), weight)[0])


def test_what_the_caller_does_to_a_result_stays_with_the_caller(no_cuda):
    x, weight, graph = torch.randn(2, 64), torch.ones(64), CUDAGraph()
    graph.capture(lambda: {"y": rms_norm(x, weight)}).pop("y")
    assert torch.equal(graph.replay()["y"], rms_norm(x, weight))


def test_on_the_cpu_results_that_cannot_be_compared_are_returned(no_cuda):
    x, graph = torch.zeros(2), CUDAGraph()
    graph.capture(lambda: {"y": x + 1, "array": np.arange(3) + int(x[0])})
    x.fill_(5.0)
    out = graph.replay()
    assert out["y"].tolist() == [6.0, 6.0]
    assert out["array"].tolist() == [5, 6, 7]


def test_without_cuda_it_warns_and_is_not_captured(no_cuda):
    graph, x = CUDAGraph(), torch.ones(2)
    with pytest.warns(UserWarning, match="no CUDA device holds the tensors"):
        out = graph.capture(lambda: x + 1)
    assert out.tolist() == [2.0, 2.0]
    assert not graph.is_captured()
    with pytest.warns(UserWarning, match="no CUDA device"), graph.capture():
        x + 1


def test_on_the_cpu_a_block_keeps_its_shapes(no_cuda):
    x, graph = torch.tensor([1.0, -1.0, 2.0]), CUDAGraph()
    with graph.capture():
        positive = x[x > 0]
    x.copy_(torch.tensor([-1.0, 3.0, 4.0]))
    graph.replay()
    assert positive.tolist() == [3.0, 4.0]
    x.fill_(1.0)
    with pytest.raises(RuntimeError, match="every op must give the shapes of its capture"):
        graph.replay()


def test_on_the_cpu_a_function_runs_once(no_cuda):
    x = torch.zeros(1)
    CUDAGraph().capture(lambda: x.add_(1))
    assert x.item() == 1


def test_replay_before_a_capture_raises(device):
    graph = CUDAGraph()
    with pytest.raises(RuntimeError, match="Graph not captured yet"):
        graph.replay()
    x = torch.ones(2, device=device)
    graph.capture(lambda: x + 1)
    graph.reset()
    assert not graph.is_captured()
    with pytest.raises(RuntimeError, match="Graph not captured yet"):
        replay_graph(graph)


def test_reset_leaves_the_dicts_of_the_caller_alone(device):
    inputs = {"x": torch.ones(2, device=device)}
    graph = CUDAGraph()
    out = graph.capture(lambda x: {"y": x + 1}, inputs)
    out.pop("y")
    again = graph.replay()
    assert again["y"].tolist() == [2.0, 2.0]
    graph.reset()
    assert list(inputs) == ["x"]
    assert again["y"].tolist() == [2.0, 2.0]


def test_an_exception_comes_through_and_leaves_the_graph_usable(device):
    graph, x = CUDAGraph(), torch.ones(2, device=device)

    def fail():
        x + 1
        raise ArithmeticError("mine")

    for warmup in (True, False):
        with pytest.raises(ArithmeticError, match="mine"):
            graph.capture(fail, warmup=warmup)
        assert not graph.is_captured()
    assert graph.capture(lambda: x + 1).tolist() == [2.0, 2.0]
    assert graph.replay().tolist() == [2.0, 2.0]


def test_arguments_that_do_not_fit(device):
    graph = CUDAGraph()
    with pytest.raises(TypeError, match=r"func must take \['x'\] by name"):
        graph.capture(lambda y: y, {"x": torch.ones(1, device=device)})
    with pytest.raises(TypeError, match="inputs must come with func"):
        graph.capture(inputs={"x": torch.ones(1, device=device)})


def test_pool_keeps_names_in_order_and_replaces(device):
    pool, x = GraphPool(), torch.ones(2, device=device)
    assert pool.capture("twice", lambda: x * 2) == "twice"
    assert pool.capture("thrice", lambda x: x * 3, {"x": x.clone()}) == "thrice"
    assert pool.list_graphs() == ["twice", "thrice"]
    assert pool.replay("twice").tolist() == [2.0, 2.0]
    assert pool.replay("thrice", x=torch.zeros_like(x)).tolist() == [0.0, 0.0]
    old = pool.get("twice")
    pool.capture("twice", lambda: x * 20)
    assert pool.get("twice") is not old
    with pytest.raises(RuntimeError, match="Graph not captured yet"):
        old.replay()
    assert pool.replay("twice").tolist() == [20.0, 20.0]
    assert pool.get("none") is None
    with pytest.raises(KeyError, match="'none'"):
        pool.replay("none")
    pool.remove("none")
    pool.remove("twice")
    assert pool.list_graphs() == ["thrice"]
    pool.clear()
    assert pool.list_graphs() == []
    assert pool.capture("again", lambda: x + 1) == "again"
    assert pool.replay("again").tolist() == [2.0, 2.0]


def test_a_failed_capture_leaves_the_pool_without_that_name(device):
    pool, x = GraphPool(), torch.ones(2, device=device)
    pool.capture("a", lambda: x + 1)

    def fail():
        raise ArithmeticError("mine")

    with pytest.raises(ArithmeticError):
        pool.capture("a", fail)
    assert pool.list_graphs() == []
    pool.capture("a", lambda: x + 2)
    assert pool.replay("a").tolist() == [3.0, 3.0]


def test_capture_graph_warms_up_as_often_as_asked(device):
    calls, x = [], torch.ones(2, device=device)

    def count():
        calls.append(1)
        return x + 1

    graph = capture_graph(count, warmup_iters=5)
    assert len(calls) == (6 if is_graph(device) else 1)
    assert replay_graph(graph).tolist() == [2.0, 2.0]
