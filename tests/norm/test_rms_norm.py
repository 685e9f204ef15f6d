"""rms_norm: values, refusals, opcheck, reference, replay; compile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck
from tolerance import assert_within_2x

from llamatelemetry.ops import reference, rms_norm


def transformers_rms_norm(x, weight, eps):
    """The arithmetic of LlamaRMSNorm."""
    x32 = x.to(torch.float32)
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (3, 7), (2, 5, 576), (4, 4096), (1, 8191), (2, 40000), (1, 70001), (0, 16), (2, 0)],
)
def test_values(device, dtype, shape):
    x = torch.randn(shape, dtype=dtype, device=device)
    weight = torch.randn(shape[-1], dtype=dtype, device=device)
    ours = rms_norm(x, weight, 1e-5)
    assert_within_2x(
        ours,
        torch.nn.functional.rms_norm(x, (shape[-1],), weight, 1e-5),
        reference.rms_norm(x.double(), weight.double(), 1e-5),
    )


@given(st.integers(1, 5), st.integers(1, 700), st.integers(0, 9), st.integers(0, 3))
def test_strided_rows_and_offsets(num_tokens, hidden_size, gap, offset):
    flat = torch.full((offset + num_tokens * (hidden_size + gap),), torch.nan)
    x = flat[offset:].view(num_tokens, hidden_size + gap)[:, :hidden_size]
    x.copy_(torch.randn(num_tokens, hidden_size))
    weight = torch.randn(hidden_size)
    assert torch.equal(rms_norm(x, weight), rms_norm(x.contiguous(), weight))


def test_refusals(device):
    x, weight = torch.randn(2, 8, device=device), torch.randn(8, device=device)
    assert_refuses(lambda: rms_norm(x, weight[:3]), "weight must be [hidden_size] = [8]", "[3]")
    assert_refuses(lambda: rms_norm(x.double(), weight), "x must be float32, float16 or bfloat16")
    assert_refuses(lambda: rms_norm(x, weight.half()), "weight must have the dtype of x", "float16")
    assert_refuses(lambda: rms_norm(x.T, weight[:2]), "x must have a contiguous last dimension")
    wide = torch.randn(4, 4, 16, device=device)[:, ::3, :8]
    assert_refuses(lambda: rms_norm(wide, weight), "x must have evenly spaced rows")
    with torch.inference_mode(False), torch.enable_grad():
        grad = torch.randn(2, 8, device=device, requires_grad=True)
        weight = torch.randn(8, device=device)
        assert_refuses(lambda: rms_norm(grad, weight), "x must not require grad", "inference_mode")


def test_opcheck(device, dtype):
    x = torch.randn(2, 3, 24, dtype=dtype, device=device)
    run_opcheck("rms_norm", x, torch.randn(24, dtype=dtype, device=device), 1e-6)
    run_opcheck("rms_norm", x[:, :0], torch.randn(24, dtype=dtype, device=device), 1e-6)
    run_opcheck("rms_norm", x.transpose(0, 1).contiguous(), x.new_ones(24), 1e-6, 1.0)


@pytest.mark.parametrize("hidden_size", [576, 2048])
def test_rounds_as_transformers_does(device, dtype, hidden_size):
    # Quarters: their squares sum exactly in any order, so only the roundings are left to differ.
    x = torch.randint(-16, 17, (16, hidden_size), device=device).to(dtype) / 4
    weight = torch.randn(hidden_size, dtype=dtype, device=device)
    assert torch.equal(rms_norm(x, weight, 1e-5), transformers_rms_norm(x, weight, 1e-5))


def gemma_rms_norm(x, weight, eps):
    """The arithmetic of GemmaRMSNorm: all of it in float32."""
    x32 = x.to(torch.float32)
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + weight.float())).to(x.dtype)


@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 576), (4, 4096), (1, 70001)])
def test_an_offset_of_the_weight(device, dtype, shape):
    x = torch.randn(shape, dtype=dtype, device=device)
    weight = torch.randn(shape[-1], dtype=dtype, device=device)
    assert_within_2x(
        rms_norm(x, weight, 1e-5, 1.0),
        gemma_rms_norm(x, weight, 1e-5),
        reference.rms_norm(x.double(), weight.double(), 1e-5, 1.0),
    )
    if shape[-1] % 64 == 0:  # as above: only the roundings are left to differ
        x = torch.randint(-16, 17, shape, device=device).to(dtype) / 4
        assert torch.equal(rms_norm(x, weight, 1e-5, 1.0), gemma_rms_norm(x, weight, 1e-5))


def test_replay(device, dtype):
    def case():
        return torch.randn(4, 96, dtype=dtype, device=device), torch.randn(96, device=device).to(
            dtype
        )

    assert_replays(rms_norm, case(), case())


def test_compile(device):
    assert_compiles(
        rms_norm,
        [(torch.randn(n, 64, device=device), torch.ones(64, device=device)) for n in (2, 5, 9)],
    )
