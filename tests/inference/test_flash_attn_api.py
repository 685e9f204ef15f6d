"""The public names of flash attention: one function, and a whole model's attention."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from families import OpCounter
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_within_2x
from torch.testing import assert_close

from llamatelemetry.inference import flash_attn as api
from llamatelemetry.inference.flash_attn import (
    FlashAttentionConfig,
    flash_attention_forward,
    get_optimal_context_length,
)

OURS = ("llamatelemetry::flash_attn", "llamatelemetry::paged_attention")


@pytest.fixture(autouse=True)
def _one_thread(set_threads):
    set_threads(1)


def qkv(seqlen_q, seqlen_k, heads=(4, 2), width=16, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, seqlen_q, heads[0], width)] + 2 * [(2, seqlen_k, heads[1], width)]
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def reference(q, k, v, causal, window, dtype=None):
    """Which key a query sees is spelt out; a query without a key gives 0."""
    left, right = (window, window) if isinstance(window, int) else (window or (-1, -1))
    at = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    keys = torch.arange(k.shape[1], device=q.device)
    seen = (keys >= 0) & (at > -(10**6))
    seen = seen & (keys <= at) if causal else seen
    seen = seen & (keys >= at - left) if left >= 0 else seen
    seen = seen & (keys <= at + right) if right >= 0 else seen
    q, k, v = (x.to(dtype or x.dtype).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    return torch.where(seen.any(-1)[:, None], out, 0.0).transpose(1, 2)


def counted(call):
    with OpCounter() as counter:
        call()
    theirs = [name for name in counter.calls if "scaled_dot_product" in name]
    return sum(counter.calls[name] for name in OURS), theirs


def test_available():
    assert api.FLASH_ATTN_AVAILABLE is True
    assert api.check_flash_attention_available() is True


def test_unavailable_without_the_library():
    """It says no and does not raise, in a process where the library does not load."""
    program = (
        "import sys; sys.modules['llamatelemetry._native'] = None\n"
        "import llamatelemetry.inference.flash_attn as module\n"
        "print(module.FLASH_ATTN_AVAILABLE)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr


def test_config_fields():
    fields = [(f.name, f.default) for f in dataclasses.fields(FlashAttentionConfig)]
    assert fields == [
        ("enabled", True),
        ("version", 2),
        ("causal", True),
        ("dropout_p", 0.0),
        ("softmax_scale", None),
        ("window_size", None),
    ]


def test_signature():
    parameters = inspect.signature(flash_attention_forward).parameters.values()
    assert [(p.name, p.default) for p in parameters][3:] == [
        ("causal", True),
        ("dropout_p", 0.0),
        ("softmax_scale", None),
        ("window_size", None),
    ]


@pytest.mark.parametrize("window", [None, -1, 0, 3, (2, 0), (-1, 2), (4, -1)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(7, 7), (3, 9), (1, 9), (9, 3), (40, 40)])
def test_forward(lengths, causal, window, device, dtype):
    q, k, v = qkv(*lengths, dtype=dtype, device=device)
    out = flash_attention_forward(q, k, v, causal=causal, window_size=window)
    assert out.is_contiguous()
    exact = reference(q, k, v, causal, window, torch.float64)
    assert_within_2x(out, reference(q, k, v, causal, window), exact)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 3)])
@pytest.mark.parametrize("width", [8, 20, 256, 264])
def test_forward_of_any_heads(heads, width, device):
    q, k, v = qkv(5, 9, heads, width, device=device)
    exact = reference(q, k, v, True, None, torch.float64)
    ours = flash_attention_forward(q, k, v)
    assert_within_2x(ours, reference(q, k, v, True, None), exact)


def test_forward_scale_strides_and_narrow_values(device):
    q, k, v = qkv(6, 6, device=device)
    v = v[..., :12]
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    out = flash_attention_forward(*apart, softmax_scale=0.7)
    want = reference(q * 0.7 * 4, k, v, True, None)
    assert out.shape == (2, 6, 4, 12)
    assert_close(out, want)


def test_forward_is_ours_and_takes_memory_linear_in_length(device):
    ours, theirs = counted(lambda: flash_attention_forward(*qkv(64, 64, device=device)))
    assert ours == 1
    assert theirs == []


def test_forward_with_gradients_has_the_same_numbers(device):
    with torch.inference_mode(False), torch.enable_grad():
        q, k, v = (x.requires_grad_() for x in qkv(5, 9, device=device))
        out = flash_attention_forward(q, k, v, window_size=3)
        out.square().sum().backward()
        gradients = [x.grad.clone() for x in (q, k, v)]
        for x in (q, k, v):
            x.grad = None
        reference(q, k, v, True, 3).square().sum().backward()
    assert_close(gradients, [x.grad for x in (q, k, v)])
    assert_close(flash_attention_forward(q.detach(), k, v, window_size=3), out.detach())


def test_forward_drops_weights(device):
    q, k, v = qkv(8, 8, device=device)
    v = torch.ones_like(v)
    outs = torch.stack([flash_attention_forward(q, k, v, dropout_p=0.5) for _ in range(200)])
    assert outs.std() > 0.1
    assert abs(outs.mean().item() - 1.0) < 0.05
    assert_close(flash_attention_forward(q, k, v), torch.ones_like(q))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), r"query must be \[batch, seqlen, num_heads, head_dim\]"),
        (lambda q, k, v: (q, k.half(), v), r"key must have query's dtype .* cast it with key.to"),
        (lambda q, k, v: (q, k[:1], v[:1]), r"key must have query's batch and head_dim"),
        (lambda q, k, v: (q, k, v[:, 1:]), r"value must be \[2, 7, 2\] and its head_dim"),
        (lambda q, k, v: (q[:, :, :3], k, v), r"key's heads must divide query's 3, got 2"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), r"query must be a floating-point tensor"),
    ],
)
def test_forward_refusals(change, message):
    with pytest.raises(ValueError, match=r"flash_attention_forward: " + message):
        flash_attention_forward(*change(*qkv(7, 7)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": -2}, "window_size must be None, an int of at least -1"),
        ({"window_size": (1, 2, 3)}, "window_size must be None"),
        ({"window_size": 1.5}, "window_size must be None, .*got 1.5"),
        ({"window_size": True}, "window_size must be None, .*got True"),
        ({"window_size": "ab"}, "window_size must be None, .*got 'ab'"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": "x"}, "dropout_p must be a number, got 'x'"),
        ({"softmax_scale": float("nan")}, "softmax_scale must be finite, got nan"),
        ({"softmax_scale": "x"}, "softmax_scale must be a number, got 'x'"),
    ],
)
def test_forward_option_refusals(options, message):
    with pytest.raises(ValueError, match=f"flash_attention_forward: {message}"):
        flash_attention_forward(*qkv(7, 7), **options)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seqlen_q", [0, 1, 40])
def test_forward_without_keys_gives_zeros(seqlen_q, causal, kind, device):
    q, k, v = qkv(seqlen_q, 0, dtype=kind, device=device)
    out = flash_attention_forward(q, k, v[..., :12], causal=causal)
    assert out.is_contiguous()
    assert torch.equal(out, q.new_zeros(2, seqlen_q, 4, 12))


def test_forward_compiled(device):
    arguments = qkv(5, 9, device=device)
    compiled = torch.compile(flash_attention_forward, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*arguments), flash_attention_forward(*arguments))


def test_context_length_of_the_guide():
    assert get_optimal_context_length(1.0, 12.0, use_flash_attention=True) == 8192
    assert get_optimal_context_length(1.0, 12.0) == 8192


@given(
    st.floats(1e-3, 1e4),
    st.floats(1e-3, 1e4),
    st.floats(1.0, 100.0),
    st.booleans(),
)
def test_context_length_is_monotone(size, vram, factor, flash):
    length = get_optimal_context_length(size, vram, flash)
    assert length in [2**n for n in range(9, 16)]
    assert get_optimal_context_length(size, vram * factor, flash) >= length
    assert get_optimal_context_length(size * factor, vram, flash) <= length
    assert get_optimal_context_length(size, vram) >= length


def test_context_length_reaches_both_ends():
    lengths = {get_optimal_context_length(1.0, vram) for vram in (1.0, 4.0, 8.0, 16.0, 80.0)}
    assert {512, 32768} < lengths
    assert get_optimal_context_length(1.0, 24.0, False) < get_optimal_context_length(1.0, 24.0)


@pytest.mark.parametrize("size", [0.0, -1.0, float("nan"), float("inf")])
def test_context_length_refuses_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="must be positive and finite"):
        get_optimal_context_length(size, 12.0)
    with pytest.raises(ValueError, match="available_vram_gb must be"):
        get_optimal_context_length(1.0, size)
