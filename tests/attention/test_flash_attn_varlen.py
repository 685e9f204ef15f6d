"""flash_attn_varlen: packed sequences of any lengths, by every implementation."""

from __future__ import annotations

import pytest
import torch
from attention.flash_cases import (
    OPTIONS,
    assert_lse,
    device_of,
    random_qkv,
    random_varlen,
    run_varlen,
    torch_attention,
    with_tensors,
)
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck
from tolerance import assert_within_2x

from llamatelemetry.ops import flash_attn, flash_attn_varlen, reference
from llamatelemetry.ops.backends import flash_choice

LENGTHS = [
    [(5, 5), (0, 7), (130, 130), (7, 0), (1, 300), (0, 0), (64, 64)],
    [(300, 17)],
    [(0, 0), (0, 9)],
]


def assert_right(device, dtype, lengths, backend, heads=(6, 2), head_dim=64, **options):
    options = with_tensors(options, heads[0], device)
    q, k, v, *starts = random_varlen(device, dtype, lengths, heads, head_dim)
    out, lse = run_varlen(q, k, v, *starts, backend=backend, **options)
    total = int(starts[0][-1])
    double = [x.double() for x in (q[:total], k, v)]
    out64, lse64 = reference.flash_attn_varlen(*double, *starts, **options)
    single = [x.float() for x in (q[:total], k, v)]
    out32, lse32 = reference.flash_attn_varlen(*single, *starts, **options)
    same = out32.to(dtype)
    for (rows, keys), b, c in zip(lengths, starts[0].tolist(), starts[1].tolist(), strict=False):
        if rows and keys:
            part = q[None, b : b + rows], k[None, c : c + keys], v[None, c : c + keys]
            same[b : b + rows] = torch_attention(*part, **options)[0]
    assert_within_2x(out[:total], same, out64)
    assert_lse(lse[:, :total], lse32, lse64, dtype)


@pytest.mark.parametrize("lengths", LENGTHS, ids=["mixed", "one", "empty"])
@pytest.mark.parametrize("name", OPTIONS)
def test_values(backend, dtype, lengths, name):
    assert_right(device_of(backend, dtype), dtype, lengths, backend, **OPTIONS[name])


@pytest.mark.parametrize("head_dim", [64, 72, 96, 128, 136, 192, 256])
@pytest.mark.parametrize("name", ["full", "causal", "causal window"])
def test_more_tiles_than_places(backend, head_dim, name):
    """Sequences of 0 to 400 tokens: a block of a persistent kernel takes many tiles."""
    if backend == "cpu":
        pytest.skip("no kernel of the CPU is persistent")
    lengths = [(n * 37 % 401, n * 91 % 401) for n in range(48)]
    device = device_of(backend, torch.float16)
    assert_right(device, torch.float16, lengths, backend, (8, 2), head_dim, **OPTIONS[name])


def test_equal_lengths_are_dense(device, dtype):
    q, k, v = (x.contiguous() for x in random_qkv(device, dtype, 3, (70, 130)))
    out, lse = flash_attn(q, k, v, causal=True)
    starts = [torch.arange(4, device=device, dtype=torch.int32) * n for n in (70, 130)]
    packed, packed_lse = run_varlen(*(x.flatten(0, 1) for x in (q, k, v)), *starts, causal=True)
    packed_lse = packed_lse.unflatten(1, (3, 70)).transpose(0, 1)
    if device.type == "cpu" or flash_choice(dtype) != "sm90":
        assert torch.equal(packed.view_as(out), out)
        assert torch.equal(packed_lse, lse)
    else:  # sm90 serves packed ones by another tile
        torch.testing.assert_close(packed.view_as(out), out, rtol=2e-2, atol=1e-2)
        torch.testing.assert_close(packed_lse, lse, rtol=1e-5, atol=1e-3)


def test_poison_past_the_last_key_stays_out(backend, dtype):
    """Keys and values of the next sequence are NaN or infinite."""
    device = device_of(backend, dtype)
    q, k, v, *starts = random_varlen(device, dtype, [(50, 70), (9, 9)])
    clean_out, clean_lse = run_varlen(q, k, v, *starts, causal=True, backend=backend)
    for poison in (torch.nan, torch.inf, -torch.inf):
        k[70:79], v[70:79] = poison, poison
        out, lse = run_varlen(q, k, v, *starts, causal=True, backend=backend)
        assert torch.equal(out[:50], clean_out[:50])
        assert torch.equal(lse[:, :50], clean_lse[:, :50])


def test_refusals(device):
    q, k, v, *starts = random_varlen(device, torch.float32, [(3, 5), (2, 2)])
    sizes = {"max_seqlen_q": 3, "max_seqlen_k": 5}

    def refuses(*parts, tensors=(q, k, v, *starts), **options):
        assert_refuses(
            lambda: flash_attn_varlen(*tensors, **(sizes | options)), "flash_attn_varlen: ", *parts
        )

    refuses("q must be [total_q, num_heads_q, head_dim], got", tensors=(q[None], k, v, *starts))
    refuses("v must be", "as q and k", tensors=(q, k, v[1:], *starts))
    refuses("cu_seqlens_q must be int32, got int64", tensors=(q, k, v, starts[0].long(), starts[1]))
    refuses("cu_seqlens_k must be [batch + 1] = [3]", tensors=(q, k, v, starts[0], starts[1][1:]))
    refuses(
        "the size of cu_seqlens_q must be at least 1", tensors=(q, k, v, starts[0][:0], starts[1])
    )
    refuses("max_seqlen_q must be at least 0, got -1", max_seqlen_q=-1)
    refuses("max_seqlen_k must be at least 0, got -2", max_seqlen_k=-2)


@pytest.mark.parametrize("starts", [[0, 3, 99], [-1, 3, 5], [0, 4, 3]], ids=str)
def test_starts_past_the_tokens_on_the_cpu(starts):
    q, k, v, *right = random_varlen(torch.device("cpu"), torch.float32, [(3, 5), (2, 2)], tail=0)
    for which, of, total in [(0, "q", 5), (1, "k", 7)]:
        given = list(right)
        given[which] = torch.tensor(starts, dtype=torch.int32)
        message = f"cu_seqlens_{of} must rise from 0 to at most {total}, the tokens of {of}, got"
        assert_refuses(
            lambda given=given: flash_attn_varlen(q, k, v, *given, max_seqlen_q=3, max_seqlen_k=5),
            message,
        )


@pytest.mark.parametrize("seqlen", [0, 1, 70])
def test_opcheck(device, dtype, seqlen):
    q, k, v, *starts = random_varlen(device, dtype, [(seqlen, 9), (4, 50)], tail=0)
    args = (*starts, max(seqlen, 4), 50, None, None, 0.125, True, -1, -1, 0.0, None)
    run_opcheck("flash_attn_varlen", q, k, v, *args)


def test_is_torch_attention(device, dtype):
    q, k, v, *starts = random_varlen(device, dtype, [(40, 40), (70, 70)], (4, 4))
    out, _ = run_varlen(q, k, v, *starts, causal=True)
    for b, e in ((0, 40), (40, 110)):
        theirs = torch.nn.functional.scaled_dot_product_attention(
            *(x[b:e].transpose(0, 1) for x in (q, k, v)), is_causal=True
        ).transpose(0, 1)
        torch.testing.assert_close(out[b:e], theirs, atol=2e-2, rtol=2e-2)


def test_replay_with_other_lengths(device, dtype):
    def run(q, k, v, starts, key_starts):
        sizes = {"max_seqlen_q": 200, "max_seqlen_k": 200}
        return flash_attn_varlen(q, k, v, starts, key_starts, causal=True, **sizes)

    cases = [
        random_varlen(device, dtype, lengths, tail=0)
        for lengths in ([(200, 200), (0, 3), (30, 40)], [(7, 9), (190, 199), (33, 35)])
    ]
    assert_replays(run, cases[0], cases[1])
    assert_replays(run, cases[1], cases[0])


def test_compile(device):
    def run(q, k, v, starts, key_starts):
        return flash_attn_varlen(q, k, v, starts, key_starts, max_seqlen_q=60, max_seqlen_k=60)

    cases = [[(n, n + 3), (5, 60), (n + 1, n)] for n in (20, 37, 50)]
    inputs = [random_varlen(device, torch.float16, lengths, tail=0) for lengths in cases]
    assert_compiles(run, inputs)
