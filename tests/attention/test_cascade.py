"""cascade_attention against paged_attention's own cases, whose rows begin with the same pages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from op_checks import assert_refuses
from paged_cases import assert_right, random_case
from tolerance import assert_within_2x

from llamatelemetry.ops import cascade_attention

SEQUENCES = [(1, 90), (1, 64), (3, 67), (17, 200), (0, 65)]


def shared_case(device, dtype, sequences=SEQUENCES, num_shared=4, head_dim=64, page_size=16):
    """A case of paged_attention whose rows share the first blocks of row 0."""
    case = random_case(device, dtype, sequences, head_dim=head_dim, page_size=page_size)
    table = case.block_table.clone()
    table[:, :num_shared] = table[0, :num_shared]
    return replace(case, block_table=table)


def run(case, num_shared, **options):
    return cascade_attention(
        *case.tensors(), num_shared_blocks=num_shared, max_seqlen_q=case.max_seqlen_q, **options
    )


def assert_cascade_right(case, num_shared, **options):
    out, lse = run(case, num_shared, **options)
    paged = case.run(**options)
    in_64 = case.reference(torch.float64, **options)
    in_32 = case.reference(torch.float32, **options)
    assert_within_2x(out, paged[0], in_64[0])
    assert_within_2x(lse, in_32[1], in_64[1])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_values(device, dtype, head_dim):
    # (1, 64) and (3, 67): the shared keys are all that the first query sees, or nearly
    sequences = [(1, 90), (1, 65), (3, 67), (17, 200), (0, 65)]
    assert_cascade_right(shared_case(device, dtype, sequences, head_dim=head_dim), 4)


@pytest.mark.parametrize(
    "options", [{"softcap": 5.0}, {"softmax_scale": 0.3}, {"sinks": 6}], ids=str
)
def test_options(device, dtype, options):
    if "sinks" in options:
        options = {"sinks": torch.randn(options["sinks"], device=device)}
    assert_cascade_right(shared_case(device, dtype), 4, **options)


@pytest.mark.parametrize("page_size", [1, 7])
def test_any_page_size(device, dtype, page_size):
    sequences = [(1, 90), (2, 80), (1, 71)]
    assert_cascade_right(
        shared_case(device, dtype, sequences, num_shared=9, page_size=page_size), 9
    )


def test_many_sequences_over_a_long_prefix(device, dtype):
    sequences = [(1, 1024 + 3 * i) for i in range(1, 40)]
    assert_cascade_right(shared_case(device, dtype, sequences, num_shared=64), 64)


def test_no_shared_block_is_paged_attention(device):
    case = shared_case(device, torch.float32, num_shared=0)
    assert_right(case)
    for ours, paged in zip(run(case, 0), case.run(), strict=True):
        assert torch.equal(ours, paged)


def test_refusals(device):
    case = shared_case(device, torch.float32)
    most = case.block_table.shape[1]
    for count in (-1, most + 1):
        assert_refuses(
            lambda count=count: run(case, count),
            f"num_shared_blocks must lie in [0, max_blocks] = [0, {most}], got {count}",
        )
    flat = replace(case, block_table=case.block_table[0])
    assert_refuses(lambda: run(flat, 1), "block_table must be [batch, max_blocks], got shape")
    short = replace(case, cu_seqlens_q=case.cu_seqlens_q[:2])
    assert_refuses(lambda: run(short, 1), "cu_seqlens_q must be [batch + 1] = [6], got shape [2]")
