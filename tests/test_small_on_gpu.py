"""Every op once on a small odd case, on the GPU as on the CPU: what compute-sanitizer runs.

compute-sanitizer --tool memcheck python -m pytest -m sanitizer tests/test_small_on_gpu.py
"""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from llamatelemetry import ops

pytestmark = [pytest.mark.gpu, pytest.mark.sanitizer]


def randn(*shape):
    return torch.randn(shape)


def q8_0_rows(n, k):
    blocks = torch.randint(0, 256, (n, k // 32, 34), dtype=torch.uint8)
    blocks[..., :2] = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
    return blocks.flatten(1)


def fused_add_rms_norm(x, residual, weight):
    ops.fused_add_rms_norm_(x, residual, weight)
    return x, residual


def rotary_embedding(q, k, cos, sin, positions):
    ops.rotary_embedding_(q, k, cos, sin, positions)
    return q, k


def append_kv(k, v, k_cache, v_cache, slots):
    ops.append_kv_(k, v, k_cache, v_cache, slots)
    return k_cache, v_cache


def copy_blocks(k_cache, v_cache, pairs):
    ops.copy_blocks_(k_cache, v_cache, pairs)
    return k_cache, v_cache


def paged_attention(q, k_cache, v_cache, table, lengths, starts):
    return ops.paged_attention(q, k_cache, v_cache, table, lengths, starts, max_seqlen_q=5)


def flash_attn(dtype, **options):
    def run(q, k, v):
        out, lse = ops.flash_attn(*(x.to(dtype) for x in (q, k, v)), **options)
        return out.float(), lse

    return run


def quantised(x, data):
    packed = ops.repack(data, "Q8_0")
    ids = torch.tensor([0, 19, 20, -1], device=x.device)
    return (
        ops.unpack(packed, "Q8_0", 20, 96),
        ops.dequantize(data, "Q8_0"),
        ops.quant_embedding(ids, packed, "Q8_0", 20, 96, torch.float32),
        ops.quant_linear(x[:1], packed, "Q8_0", 20, exact=True),
        ops.quant_linear(x, packed, "Q8_0", 20, exact=True),
    )


def sample(logits):
    rows = torch.ones(3, device=logits.device)
    temperature = torch.tensor([0.0, 1.0, 0.7], device=logits.device)
    seed = torch.arange(3, device=logits.device)
    return ops.sample(logits, temperature, (rows * 7).int(), rows * 0.9, rows * 0.01, seed, seed)


CASES = {
    "rms_norm": lambda: (ops.rms_norm, randn(3, 77), randn(77)),
    "layer_norm": lambda: (ops.layer_norm, randn(3, 77), randn(77), randn(77)),
    "fused_add_rms_norm_": lambda: (fused_add_rms_norm, randn(3, 77), randn(3, 77), randn(77)),
    "silu_and_mul": lambda: (ops.silu_and_mul, randn(3, 2 * 77)),
    "gelu_and_mul": lambda: (ops.gelu_and_mul, randn(3, 2 * 77)),
    "gelu_tanh_and_mul": lambda: (ops.gelu_tanh_and_mul, randn(3, 2 * 77)),
    "softmax": lambda: (ops.softmax, randn(3, 1003)),
    "rotary_embedding_": lambda: (
        *(rotary_embedding, randn(3, 5, 24), randn(3, 2, 24), randn(9, 16), randn(9, 16)),
        torch.tensor([8, 0, 3]),
    ),
    "append_kv_": lambda: (
        *(append_kv, randn(3, 2, 24), randn(3, 2, 24), randn(4, 7, 2, 24), randn(4, 7, 2, 24)),
        torch.tensor([27, -1, 0]),
    ),
    "copy_blocks_": lambda: (
        *(copy_blocks, randn(4, 7, 2, 24), randn(4, 7, 2, 24)),
        torch.tensor([[0, 3], [1, 2]]),
    ),
    **{
        f"flash_attn {dtype} {head_dim} {options}": lambda d=dtype, h=head_dim, o=options: (
            flash_attn(getattr(torch, d), **o),
            randn(2, 70, 4, h),
            randn(2, 133, 2, h),
            randn(2, 133, 2, h),
        )
        for dtype, head_dim, options in [
            ("float32", 24, {}),
            ("float16", 64, {"causal": True}),
            ("float16", 128, {"window_size": (40, 3)}),
            ("bfloat16", 40, {"causal": True, "softcap": 5.0}),
            ("bfloat16", 256, {}),
        ]
    },
    "paged_attention": lambda: (
        *(paged_attention, randn(6, 6, 24), randn(4, 7, 2, 24), randn(4, 7, 2, 24)),
        torch.tensor([[3, 0], [2, 1]], dtype=torch.int32),
        torch.tensor([11, 9], dtype=torch.int32),
        torch.tensor([0, 5, 6], dtype=torch.int32),
    ),
    "quantised": lambda: (quantised, randn(9, 96), q8_0_rows(20, 96)),
    "sample in one slice": lambda: (sample, randn(3, 1003)),
    "sample in slices": lambda: (sample, randn(3, 5003)),
}


@pytest.mark.parametrize("case", CASES)
def test_gpu_gives_what_the_cpu_gives(case):
    function, *args = CASES[case]()
    on_gpu = function(*(arg.cuda() for arg in args))
    on_cpu = function(*args)
    pairs = zip(
        *((x,) if isinstance(x, torch.Tensor) else x for x in (on_gpu, on_cpu)), strict=True
    )
    for gpu, cpu in pairs:
        assert_close(gpu.cpu(), cpu, rtol=1e-4, atol=1e-4)
