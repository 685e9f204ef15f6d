"""Which thread takes an item decides nothing about its result: long items move between threads."""

from __future__ import annotations

import pytest
import torch

from llamatelemetry import ops


def flash_attn(dtype=torch.float32):
    q, k, v = (torch.randn(2, 900, heads, 64).to(dtype) for heads in (4, 2, 2))
    return lambda: ops.flash_attn(q, k, v, causal=True)[0]


def flash_attn_bfloat16():
    return flash_attn(torch.bfloat16)


def flash_attn_of_infinity():
    q, k, v = (torch.randn(1, 480, heads, 64).bfloat16() for heads in (5, 1, 1))
    v[0, 150::39] = torch.inf  # 0 * infinity for rows that do not see it, but share products
    return lambda: ops.flash_attn(q, k, v, causal=True)[0].nan_to_num(nan=1e30)


def paged_attention(dtype=torch.float32):
    q, k, v = (torch.randn(s).to(dtype) for s in [(700, 4, 64), (60, 16, 2, 64), (60, 16, 2, 64)])
    table = torch.randperm(60, dtype=torch.int32).view(2, 30)
    lengths, starts = (torch.tensor(x, dtype=torch.int32) for x in ([480, 300], [0, 450, 700]))
    return lambda: ops.paged_attention(q, k, v, table, lengths, starts, max_seqlen_q=450)[0]


def paged_attention_bfloat16():
    return paged_attention(torch.bfloat16)


def quant_linear():
    blocks = torch.randint(0, 256, (2048, 64, 34), dtype=torch.uint8)
    blocks[..., :2] = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
    data, x = ops.repack(blocks.flatten(1), "Q8_0"), torch.randn(70, 2048)
    return lambda: ops.quant_linear(x, data, "Q8_0", 2048)


def softmax():
    x = torch.randn(31, 20000)
    return lambda: ops.softmax(x)


CASES = [
    flash_attn,
    flash_attn_bfloat16,
    flash_attn_of_infinity,
    paged_attention,
    paged_attention_bfloat16,
    quant_linear,
    softmax,
]


@pytest.mark.parametrize("case", CASES)
def test_result_is_the_same_from_any_number_of_threads(case, set_threads):
    run = case()
    set_threads(1)
    alone = run()
    for count in (2, 3, 7):
        set_threads(count)
        for _ in range(5):
            assert torch.equal(run(), alone)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [7, 31])
def test_each_item_is_done_once(rows, count, set_threads):
    hidden = 10240  # so many that rows are long items
    x, residual = torch.empty(rows, hidden), torch.zeros(rows, hidden)
    weight = torch.ones(hidden)
    set_threads(count)
    for launch in range(1, 301):
        ops.fused_add_rms_norm_(x.fill_(1), residual, weight)
        assert torch.all(residual == launch)
