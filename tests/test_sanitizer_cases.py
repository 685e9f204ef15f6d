"""Every op once on a small odd case, on the GPU as on the CPU: what compute-sanitizer runs.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \\
    python -m pytest -m sanitizer tests/test_sanitizer_cases.py

Without the variable tensors share memory, where neither overruns nor what was never written show.
initcheck does not see stores by TMA: it takes copies of such results to the host, those of sm90,
for reads of what nobody wrote, unless `--check-api-memory-access no` is given. Even so it reports
8-byte reads of decode: flags of parts, which count only where they hold the launch's number.
synccheck says that nobody waits for barriers of the blocks from 9 on of several clusters of 16. It
says so of a program of one barrier and one wait too: leave out `one_sequence` there.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from decode_cases import CASES as DECODE_CASES
from torch.testing import assert_close

from llamatelemetry import ops
from llamatelemetry.ops.backends import flash_why_not
from llamatelemetry.quantization.groups import pack_groups

pytestmark = [pytest.mark.gpu, pytest.mark.sanitizer]


int32 = partial(torch.tensor, dtype=torch.int32)


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


def rope_append_kv(qkv, cos, sin, positions, k_cache, v_cache, slots, weight):
    where = (positions, False, k_cache, v_cache, slots)
    ops.rope_append_kv_(qkv, cos, sin, *where, weight, weight)
    return qkv, k_cache, v_cache


def copy_blocks(k_cache, v_cache, pairs):
    ops.copy_blocks_(k_cache, v_cache, pairs)
    return k_cache, v_cache


def swap_blocks(k_from, v_from, k_to, v_to, pairs):
    ops.swap_blocks_(k_from, v_from, k_to, v_to, pairs)
    return k_to, v_to


def advance_step(*args):
    ops.advance_step_(*args, 7)
    return args[:5]


def paged_attention(q, k_cache, v_cache, table, lengths, starts):
    return ops.paged_attention(q, k_cache, v_cache, table, lengths, starts, max_seqlen_q=5)


def flash_case(backend, dtype, head_dim, options):
    def run(q, k, v):
        if q.is_cuda and (reason := flash_why_not(backend, dtype)):
            pytest.skip(f"{backend}: {reason}")
        chosen = backend if q.is_cuda else "cpu"
        return ops.flash_attn(*(x.to(dtype) for x in (q, k, v)), backend=chosen, **options)

    shapes = ((2, 70, 4, head_dim), (2, 133, 2, head_dim), (2, 133, 2, head_dim))
    return lambda: (run, *(randn(*shape) for shape in shapes))


def flash_varlen(q, k, v, starts, key_starts):
    sizes = {"max_seqlen_q": 60, "max_seqlen_k": 90}
    q, k, v = q.half(), k.half(), v.half()
    return ops.flash_attn_varlen(q, k, v, starts, key_starts, causal=True, **sizes)


def paged_prefill(q, k_cache, v_cache, table, lengths, starts):
    args = (q.half(), k_cache.half(), v_cache.half(), table, lengths, starts)
    return ops.paged_attention(*args, max_seqlen_q=20)


def linears(x, weight, bias, residual):
    """Rows that wide loads can read, in both kernels; in half precision, as those have it."""
    x, weight, bias, residual = (t.half() for t in (x, weight, bias, residual))
    return (
        ops.linear(x[:3], weight, bias, residual[:3]),
        ops.linear(x, weight, bias, residual[:, :17].contiguous(), "silu_and_mul"),
        ops.linear(x.repeat(2, 1), weight, bias, None, "gelu"),
    )


def grouped(activation, x, codes, scales, zeros):
    """In half precision the kernel for few rows applies a gate; without, another launch does."""
    w = pack_groups(codes, "U4", scales, zeros)
    sides = (None, True, w.scales, w.zeros, None, activation)
    tensors = (x, x[:1], x.half(), x[:1].half())
    return tuple(ops.quant_linear(t, w.packed, "U4", len(codes), *sides) for t in tensors)


def products(a, b):
    """Ragged, and copied first; and rows that need no copy, of every kernel that is there."""
    half, ints = [x.half() for x in (a, b)], [x.to(torch.int8) for x in (a, b)]
    aligned = [x[:, :40].contiguous() for x in half]
    return (
        ops.gemm(a, b.T),
        ops.gemm(*half, 0.5, 2.0, trans_b=True, c=a[:, : b.shape[0]].half()),
        ops.gemm(*aligned, trans_b=True),
        ops.gemm(aligned[0].T.contiguous(), aligned[1], trans_a=True, trans_b=True),
        ops.tensor_core_gemm(*half, trans_b=True),
        ops.tensor_core_gemm_int8(*ints, trans_b=True),
    )


def bytes_a_value(x, weight, norm):
    """Rows of every source, and their product with rows that need no copy and rows that do."""
    done = []
    for dtype in (torch.int8, torch.float8_e4m3fn):
        made = (
            ops.quantize_rows(x, dtype),
            ops.rms_norm_quantize(x, norm, dtype),
            ops.silu_and_mul_quantize(x, dtype, 128),
            ops.fused_add_rms_norm_quantize_(x, x.clone(), norm, dtype),
        )
        q, scales = made[0]
        w, w_scales = ops.quantize_rows(weight, dtype)
        done += [s for _, s in made]
        done.append(ops.scaled_linear(q, scales, w, w_scales, torch.float32))
    return tuple(done)


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


def token_bitmask(logits):
    words = torch.arange(3 * 32, device=logits.device).view(3, 32).int() * 0x1234567
    ops.apply_token_bitmask_(logits, words)
    return logits


CASES = {
    "rms_norm": lambda: (ops.rms_norm, randn(3, 77), randn(77)),
    "layer_norm": lambda: (ops.layer_norm, randn(3, 77), randn(77), randn(77)),
    "layer_norm of many long rows": lambda: (
        *(ops.layer_norm, randn(8 * 160 + 1, 4096), randn(4096), randn(4096)),
    ),
    "fused_add_rms_norm_": lambda: (fused_add_rms_norm, randn(3, 77), randn(3, 77), randn(77)),
    "silu_and_mul": lambda: (ops.silu_and_mul, randn(3, 2 * 77)),
    "gelu_and_mul": lambda: (ops.gelu_and_mul, randn(3, 2 * 77)),
    "gelu_tanh_and_mul": lambda: (ops.gelu_tanh_and_mul, randn(3, 2 * 77)),
    "activation": lambda: (lambda x: ops.activation(x, "relu2"), randn(3, 77)),
    "softmax": lambda: (ops.softmax, randn(3, 1003)),
    "rotary_embedding_": lambda: (
        *(rotary_embedding, randn(3, 5, 24), randn(3, 2, 24), randn(9, 16), randn(9, 16)),
        torch.tensor([8, 0, 3]),
    ),
    "append_kv_": lambda: (
        *(append_kv, randn(3, 2, 24), randn(3, 2, 24), randn(4, 7, 2, 24), randn(4, 7, 2, 24)),
        torch.tensor([27, -1, 0]),
    ),
    **{
        f"rope_append_kv_ of {head_dim}": lambda head_dim=head_dim: (
            *(rope_append_kv, randn(3, 7, head_dim), randn(9, 16), randn(9, 16)),
            torch.tensor([8, 0, 3]),
            *(randn(4, 7, 2, head_dim), randn(4, 7, 2, head_dim)),
            *(torch.tensor([27, -1, 0]), randn(head_dim)),
        )
        for head_dim in (24, 35)
    },
    "copy_blocks_": lambda: (
        *(copy_blocks, randn(4, 7, 2, 24), randn(4, 7, 2, 24)),
        torch.tensor([[0, 3], [1, 2]]),
    ),
    "merge_attn_states": lambda: (
        *(ops.merge_attn_states, randn(3, 5, 24), randn(5, 3), randn(3, 5, 24), randn(5, 3)),
    ),
    "swap_blocks_": lambda: (
        *(swap_blocks, randn(4, 7, 2, 24), randn(4, 7, 2, 24), randn(3, 7, 2, 24)),
        *(randn(3, 7, 2, 24), torch.tensor([[0, 2], [3, 0]])),
    ),
    "slot_mapping": lambda: (
        *(lambda *args: ops.slot_mapping(*args, 7), torch.tensor([0, 13, 6, 14, 3])),
        *(int32([[3, 0], [-1, 1]]), int32([0, 2, 4])),
    ),
    "advance_step_": lambda: (
        *(advance_step, *(torch.tensor([5, 6, 13]) for _ in range(3))),
        *(int32([6, 7, 14]), torch.tensor([0, 3, 9])),
        *(torch.tensor([90, 91, 92]), torch.tensor([True, False, True])),
        int32([[3, 0], [2, 1], [4, 5]]),
    ),
    **{
        f"flash_attn {name} {head_dim} {options}": flash_case(name, dtype, head_dim, options)
        for name, dtype, head_dim, options in [
            ("simt", torch.float32, 24, {}),
            ("sm75", torch.float16, 64, {"causal": True}),
            ("sm75", torch.float16, 136, {"window_size": (40, 3)}),
            ("sm80", torch.float16, 64, {"causal": True}),
            ("sm80", torch.bfloat16, 40, {"causal": True, "softcap": 5.0}),
            ("sm80", torch.float16, 128, {"window_size": (40, 3)}),
            ("sm80", torch.bfloat16, 256, {}),
            ("sm90", torch.float16, 64, {"causal": True}),
            ("sm90", torch.bfloat16, 40, {"causal": True, "softcap": 5.0}),
            ("sm90", torch.float16, 128, {"window_size": (40, 3)}),
            ("sm90", torch.bfloat16, 256, {}),
            # Weights that outgrow float16, and those that outgrow float32.
            ("sm90", torch.float16, 64, {"softmax_scale": 1.0}),
            ("sm90", torch.bfloat16, 128, {"softmax_scale": 20.0}),
        ]
    },
    "paged_attention": lambda: (
        *(paged_attention, randn(6, 6, 24), randn(4, 7, 2, 24), randn(4, 7, 2, 24)),
        *(int32([[3, 0], [2, 1]]), int32([11, 9]), int32([0, 5, 6])),
    ),
    "flash_attn_varlen": lambda: (
        *(flash_varlen, randn(64, 4, 64), randn(99, 2, 64), randn(99, 2, 64)),
        *(int32([0, 60, 60, 64]), int32([0, 90, 95, 99])),
    ),
    **{
        f"paged prefill, pages of {size}": lambda size=size: (
            *(paged_prefill, randn(21, 6, 24), randn(12, size, 2, 24), randn(12, size, 2, 24)),
            torch.randperm(12, dtype=torch.int32).view(2, 6),
            *(int32([40, 9]), int32([0, 20, 21])),
        )
        for size in (7, 8)
    },
    **DECODE_CASES,
    **{
        f"scaled_linear, {k}": lambda k=k: (bytes_a_value, randn(5, k), randn(21, k), randn(k))
        for k in (78, 80)  # in tiles, and by the kernel for few rows
    },
    "gemm": lambda: (products, randn(13, 77), randn(21, 77)),
    "linear": lambda: (linears, randn(13, 72), randn(34, 72) / 8, randn(34), randn(13, 34)),
    **{
        f"grouped, {name}": lambda name=name, n=n, k=k, most=most: (
            *(partial(grouped, name), randn(9, k), torch.randint(16, (n, k)).byte()),
            *(most * torch.rand(n, k // 32).half(), torch.randint(16, (n, k // 32)).byte()),
        )
        for name, n, k, most in ((None, 20, 96, 1 / 9), ("silu_and_mul", 96, 256, 1 / 99))
    },
    "quantised": lambda: (quantised, randn(9, 96), q8_0_rows(20, 96)),
    "sample in one slice": lambda: (sample, randn(3, 1003)),
    "sample in slices": lambda: (sample, randn(3, 5003)),
    "apply_token_bitmask_": lambda: (token_bitmask, randn(3, 1003)),
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
        rounded = (
            "flash",
            "paged prefill",
            "paged decode",
            "linear",
            "gemm",
            "grouped",
            "scaled_linear",
        )
        rounding = 1e-4 if not case.startswith(rounded) else 2e-2
        assert gpu.dtype == cpu.dtype
        # Converted on the CPU: what a kernel reads of a result, initcheck would report.
        gpu = gpu.cpu()
        if cpu.is_floating_point():
            gpu, cpu = gpu.float(), cpu.float()
        assert_close(gpu, cpu, rtol=rounding, atol=rounding)
