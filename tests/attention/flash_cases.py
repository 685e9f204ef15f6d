"""Inputs of flash_attn, torch's own attention over them, and the comparison."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_within_2x
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llamatelemetry.ops import flash_attn, flash_attn_varlen, reference
from llamatelemetry.ops.backends import flash_why_not

OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "left": {"window_size": (37, -1)},
    "right": {"window_size": (-1, 20)},
    "both": {"window_size": (100, 5)},
    "zero": {"window_size": (0, 0)},
    "causal window": {"causal": True, "window_size": (64, -1)},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi_slopes": True},
}


def with_tensors(options, heads, device):
    made = dict(options)
    if made.get("sinks"):
        made["sinks"] = torch.randn(heads, device=device)
    if made.get("alibi_slopes"):
        made["alibi_slopes"] = torch.rand(heads, device=device) / 4
    return made


def device_of(backend, dtype):
    """Where the backend runs; skips what it says it does not serve."""
    device = torch.device("cpu" if backend == "cpu" else "cuda")
    if backend != "cpu" and (reason := flash_why_not(backend, dtype)):
        pytest.skip(f"{backend}: {reason}")
    return device


def random_qkv(device, dtype, batch, lengths, heads=(6, 2), head_dim=64, scale=1.0):
    """q, k, v of (seqlen_q, seqlen_k) as slices of one merged tensor each, NaN around them."""

    def tensor(seqlen, num_heads):
        whole = torch.full((batch, seqlen + 2, num_heads + 1, head_dim + 8), torch.nan, dtype=dtype)
        part = whole[:, 1 : seqlen + 1, :num_heads, 8:]
        part.copy_(torch.randn(part.shape))
        return whole.to(device)[:, 1 : seqlen + 1, :num_heads, 8:]

    q, k, v = (
        tensor(lengths[0], heads[0]),
        tensor(lengths[1], heads[1]),
        tensor(lengths[1], heads[1]),
    )
    return q * scale if scale != 1.0 else q, k, v


def torch_attention(q, k, v, **options) -> Tensor:
    """The same formula in q's dtype by torch: its math attention with a mask, where it can."""
    if options.get("softcap") or options.get("sinks") is not None:
        wide = {n: x.float() if isinstance(x, Tensor) else x for n, x in options.items()}
        return reference.flash_attn(q.float(), k.float(), v.float(), **wide)[0].to(q.dtype)
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    left, right = options.get("window_size", (-1, -1))
    right = 0 if options.get("causal") else right
    position = torch.arange(seqlen_q, device=q.device)[:, None] + seqlen_k - seqlen_q
    distance = torch.arange(seqlen_k, device=q.device) - position
    hidden = (right >= 0) & (distance > right) | (left >= 0) & (-distance > left)
    bias = torch.zeros(1, 1, seqlen_q, seqlen_k, dtype=torch.float32, device=q.device)
    if (slopes := options.get("alibi_slopes")) is not None:
        bias = -slopes.view(-1, q.shape[2], 1, 1) * distance.abs()
    bias = bias.masked_fill(hidden, -torch.inf).to(q.dtype)
    scale = options.get("softmax_scale")
    with sdpa_kernel(SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias, scale=scale, enable_gqa=True
        ).transpose(1, 2)
    return out.masked_fill(hidden.all(-1)[:, None, None], 0)


def assert_right(q, k, v, backend=None, **options):
    """Within twice torch's error; returns out and lse."""
    out, lse = flash_attn(q, k, v, backend=backend, **options)
    out64, lse64 = reference.flash_attn(q.double(), k.double(), v.double(), **options)
    _, lse32 = reference.flash_attn(q.float(), k.float(), v.float(), **options)
    assert out.is_contiguous()
    assert_within_2x(out, torch_attention(q, k, v, **options), out64)
    assert_lse(lse, lse32, lse64, q.dtype)
    return out, lse


def assert_lse(lse, lse32, lse64, dtype):
    """lse is float32, but tensor cores cut off low bits of sums and exp2 is approximate."""
    room, relative = (1e-6, 1e-6) if dtype == torch.float32 else (1e-3, 1e-5)
    assert torch.equal(lse.isinf(), lse64.isinf())
    finite = lse64.isfinite()
    error = (lse.double() - lse64)[finite].abs().max() if finite.any() else torch.zeros(())
    own = (lse32.double() - lse64)[finite].abs().max() if finite.any() else torch.zeros(())
    largest = lse64[finite].abs().max() if finite.any() else torch.zeros(())
    assert error <= 2 * own + room + relative * largest


def random_varlen(device, dtype, lengths, heads=(6, 2), head_dim=64, tail=3):
    """q, k, v packed, cu_seqlens of both; tail NaN rows stand past the last sequence."""
    queries, keys = [n for n, _ in lengths], [n for _, n in lengths]

    def tensor(total, num_heads):
        whole = torch.full((total + tail, num_heads, head_dim), torch.nan, dtype=dtype)
        whole[:total] = torch.randn(total, num_heads, head_dim)
        return whole.to(device)

    starts = [torch.tensor([0, *n]).cumsum(0).int().to(device) for n in (queries, keys)]
    q, k, v = (tensor(sum(n), h) for n, h in ((queries, heads[0]), *((keys, heads[1]),) * 2))
    return q, k, v, *starts


def run_varlen(q, k, v, starts, key_starts, **options):
    longest = [int(x.diff().max()) if len(x) > 1 else 0 for x in (starts, key_starts)]
    return flash_attn_varlen(
        q, k, v, starts, key_starts, max_seqlen_q=longest[0], max_seqlen_k=longest[1], **options
    )
