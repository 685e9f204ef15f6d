"""Kernels that overlap their starts give what they give one at a time."""

from __future__ import annotations

import pytest
import torch

from llamatelemetry.ops import fused_add_rms_norm_, rms_norm, rotary_embedding_, silu_and_mul

NUM_STEPS = 20


def inputs(dtype, num_tokens):
    """x, residual, weight, cos, sin."""
    generator = torch.Generator("cuda").manual_seed(1)
    shapes = [(num_tokens, 1024), (num_tokens, 1024), (1024,), (num_tokens, 64)]
    x, residual, weight, angle = (
        torch.randn(shape, device="cuda", generator=generator) for shape in shapes
    )
    return [y.to(dtype) for y in (x, residual, weight, angle.cos(), angle.sin())]


def step(x, residual, weight, cos, sin, between=lambda: None):
    """Every kernel reads what the one before it, or two before it, wrote; torch's kernels stand
    between ours, and the weight is written just before it is read."""
    fused_add_rms_norm_(x, residual, weight)
    between()
    weight.mul_(0.5).add_(0.7)
    between()
    y = rms_norm(x, weight)
    between()
    fused_add_rms_norm_(y, residual, weight)
    between()
    rotary_embedding_(y.view(-1, 16, 64), x.view(-1, 16, 64), cos, sin)
    between()
    z = silu_and_mul(torch.cat([y, x], -1))
    between()
    fused_add_rms_norm_(z, residual, weight)
    between()
    x.copy_(rms_norm(z, weight))
    residual.mul_(0.25)  # or float16 overflows after some steps
    between()


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize("num_tokens", [1, 33, 3000])
def test_overlapped_kernels_wait_for_what_they_read(dtype, num_tokens):
    one_at_a_time, streamed, replayed = (inputs(dtype, num_tokens) for _ in range(3))
    for _ in range(NUM_STEPS):
        step(*one_at_a_time, between=torch.cuda.synchronize)
    for _ in range(NUM_STEPS):
        step(*streamed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*replayed)
    for _ in range(NUM_STEPS):
        graph.replay()
    assert not one_at_a_time[0].isnan().any()
    for expected, in_stream, in_graph in zip(one_at_a_time, streamed, replayed, strict=True):
        assert torch.equal(expected, in_stream)
        assert torch.equal(expected, in_graph)
