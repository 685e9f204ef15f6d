"""The ops in Triton compiled without a break, and on a GPU replayed as a CUDA graph."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

pytest.importorskip("triton")

from llamatelemetry.triton_ops import attention, gemm, norm

HEADS, HEADS_KV, HEAD_DIM, HIDDEN = 4, 2, 32, 64


def weights_on(device):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = ((HEADS + 2 * HEADS_KV) * HEAD_DIM, 96, 2 * HIDDEN)
    columns = (HIDDEN, HEADS * HEAD_DIM, 96)
    made = [torch.randn(n, k, device=device).to(dtype) for n, k in zip(rows, columns, strict=True)]
    return [torch.rand(HIDDEN, device=device).to(dtype), *made]


def layer(x, starts, norm_weight, qkv, out, gate_up):
    """A norm, a projection, attention over one sequence, another projection, a gated one."""
    y = gemm.linear(norm.rms_norm(x, norm_weight, 1e-6), qkv).view(-1, HEADS + 2 * HEADS_KV, 32)
    q, k, v = y.split((HEADS, HEADS_KV, HEADS_KV), 1)
    scores = (HEAD_DIM**-0.5, True, -1, -1, 0.0)
    y = attention.flash_attn_varlen(q, k, v, starts, x.shape[0], *scores)
    return gemm.linear(gemm.linear(y.flatten(1), out), gate_up, None, "silu")


def inputs_of(rows, weights):
    x = torch.randn(rows, HIDDEN, device=weights[0].device).to(weights[0].dtype)
    return x, torch.tensor([0, rows], dtype=torch.int32, device=x.device)


def test_one_graph_serves_any_number_of_rows(device):
    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    frames = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, backend=frames, fullgraph=True, dynamic=True)
    weights = weights_on(device)
    for rows in (3, 7, 12):
        x, starts = inputs_of(rows, weights)
        ours = compiled(x, starts, *weights)
        torch.testing.assert_close(ours, layer(x, starts, *weights), rtol=0, atol=0)
    assert frames.frame_count == 1, "another number of rows was compiled anew"


def test_a_cuda_graph_gives_the_same(device):
    if device.type != "cuda":
        pytest.skip("needs a device with graphs")
    weights = weights_on(device)
    x, starts = inputs_of(9, weights)
    expected = layer(x, starts, *weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = layer(x, starts, *weights)
    graph.replay()
    assert torch.equal(ours, expected)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(ours, layer(x, starts, *weights))
