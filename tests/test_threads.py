"""Which thread takes an item decides nothing about its result: long items move between threads."""

from __future__ import annotations

import pytest
import torch

from llamatelemetry import ops


def flash_attn():
    q, k, v = (torch.randn(2, 900, heads, 64) for heads in (4, 2, 2))
    return lambda: ops.flash_attn(q, k, v, causal=True)[0]


def paged_attention():
    q, k, v = torch.randn(700, 4, 64), torch.randn(60, 16, 2, 64), torch.randn(60, 16, 2, 64)
    table = torch.randperm(60, dtype=torch.int32).view(2, 30)
    lengths, starts = (torch.tensor(x, dtype=torch.int32) for x in ([480, 300], [0, 450, 700]))
    return lambda: ops.paged_attention(q, k, v, table, lengths, starts, max_seqlen_q=450)[0]


def quant_linear():
    blocks = torch.randint(0, 256, (2048, 64, 34), dtype=torch.uint8)
    blocks[..., :2] = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
    data, x = ops.repack(blocks.flatten(1), "Q8_0"), torch.randn(70, 2048)
    return lambda: ops.quant_linear(x, data, "Q8_0", 2048)


def softmax():
    x = torch.randn(31, 20000)
    return lambda: ops.softmax(x)


@pytest.mark.parametrize("case", [flash_attn, paged_attention, quant_linear, softmax])
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
