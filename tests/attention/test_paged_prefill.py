"""paged_attention of many queries: pages of any size, chunks, tables that are too short."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paged_cases import Case, assert_right, random_case, sdpa
from tolerance import assert_within_2x


@pytest.mark.parametrize("page_size", [1, 8, 16, 24, 64, 128, 256])
@pytest.mark.parametrize("heads", [(2, 2), (9, 3), (9, 1)], ids=str)
def test_prefill(device, dtype, heads, page_size):
    assert_right(
        random_case(device, dtype, [(n, n) for n in (1, 3, 113, 239)], heads, 64, page_size)
    )


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_long_chunks(device, dtype, page_size, head_dim):
    sequences = [(200, 1000), (0, 50), (333, 333), (16, 700)]
    assert_right(random_case(device, dtype, sequences, (4, 2), head_dim, page_size))


@pytest.mark.parametrize("most", [16, 200])
def test_more_tiles_than_places(device, dtype, most):
    # Blocks of a GPU work on several tiles one after the other, some of them without a key.
    sequences = [(1 + i * 37 % most, i * 53 % 400) for i in range(60)]
    sequences[7:9] = [(most, 390), (0, 40)]
    assert_right(random_case(device, dtype, sequences, (6, 2)))
    assert_right(random_case(device, dtype, sequences, (6, 2)), window_size=(100, -1))


@pytest.mark.parametrize("page_size", [40, 301])
def test_one_page_a_sequence(device, dtype, page_size):
    # As transformers' caches are: the page may end anywhere.
    sequences = [
        (min(queries, page_size), page_size - less) for queries, less in [(20, 0), (200, 3)]
    ]
    assert_right(random_case(device, dtype, sequences, (4, 2), 64, page_size, max_blocks=1))


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_chunked_prefill_is_full_prefill(device, dtype, chunk):
    full = random_case(device, dtype, [(150, 150)], (9, 3))
    _, full_lse = full.run()
    out64, _ = full.reference(torch.float64)
    outs, lses = [], []
    for start in range(0, 150, chunk):
        q = full.q[start : start + chunk]
        length = torch.tensor([start + len(q)], dtype=torch.int32, device=device)
        starts = torch.tensor([0, len(q)], dtype=torch.int32, device=device)
        part = replace(full, q=q, cache_seqlens=length, cu_seqlens_q=starts, max_seqlen_q=chunk)
        out, lse = part.run()
        outs.append(out)
        lses.append(lse)
    assert_within_2x(torch.cat(outs), sdpa(full), out64)
    # Of 16 bits few queries and many run on different kernels.
    rounding = {} if dtype == torch.float32 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(torch.cat(lses, 1), full_lse, **rounding)


def test_a_table_too_short_for_its_length_is_not_read_past_its_end(device, dtype):
    case = random_case(device, torch.float32, [(1, 64)], page_size=16, max_blocks=4)
    longer = replace(case, cache_seqlens=case.cache_seqlens + 1000)
    assert torch.equal(longer.run()[0], case.run()[0])
    for queries in (1, 15, 16, 40):  # the last stands at key 99 of 100, of which 64 have a page
        case = random_case(device, dtype, [(queries, 64)], page_size=16, max_blocks=4)
        longer = replace(case, cache_seqlens=case.cache_seqlens + 36)
        alone = replace(longer, q=longer.q[:1], max_seqlen_q=1)
        window = (70 + queries, -1)
        for options in ({}, {"window_size": window, "causal": False}):
            out, _ = longer.run(**options)
            assert out.isfinite().all()
        first_key = 99 - queries + 1
        seen = min(first_key + 1, 64)
        alone = replace(
            alone,
            cache_seqlens=torch.tensor([seen], dtype=torch.int32, device=device),
            cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32, device=device),
        )
        torch.testing.assert_close(longer.run()[0][:1], alone.run()[0], rtol=1e-2, atol=1e-2)


def test_a_window_counts_from_keys_that_have_no_page(device, dtype):
    case = random_case(device, dtype, [(16, 64)], page_size=16, max_blocks=4)
    longer = replace(case, cache_seqlens=case.cache_seqlens + 236)  # queries stand at 284 to 299
    out, lse = longer.run(window_size=(200, 0))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    options = {"window_size": (270, -1), "causal": False}  # the first sees keys 14 to 63
    on_cpu = Case(*(x.cpu() for x in longer.tensors()), longer.max_seqlen_q)
    torch.testing.assert_close(
        longer.run(**options)[0].cpu(), on_cpu.run(**options)[0], rtol=2e-2, atol=2e-2
    )


def test_a_table_for_more_than_2_31_keys(device, dtype):
    pages = torch.randn(2, 1, 65536, 1, 64, device=device).to(dtype)
    q = torch.randn(64, 2, 64, device=device).to(dtype)
    lengths = (torch.tensor(n, dtype=torch.int32, device=device) for n in ([1000], [0, 64]))
    table = torch.zeros(1, 32769, dtype=torch.int32, device=device)
    case = Case(q, *pages, table, *lengths, 64)
    short = replace(case, block_table=table[:, :1])
    torch.testing.assert_close(case.run()[0], short.run()[0], rtol=2e-2, atol=2e-2)
