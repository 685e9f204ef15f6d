"""flash_attn, every implementation that serves the device."""

from __future__ import annotations

import itertools

import pytest
import torch
from attention.flash_cases import (
    OPTIONS,
    assert_right,
    device_of,
    random_qkv,
    torch_attention,
    with_tensors,
)
from hypothesis import given
from hypothesis import strategies as st
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck
from tolerance import assert_within_2x

from llamatelemetry.ops import flash_attn, reference


@pytest.mark.parametrize("lengths", [(1, 1), (3, 113), (113, 3), (239, 239), (200, 799)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_values(backend, dtype, name, lengths):
    device = device_of(backend, dtype)
    options = with_tensors(OPTIONS[name], 6, device)
    assert_right(*random_qkv(device, dtype, 2, lengths), backend, **options)


@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 96, 128, 136, 192, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_head_dims(backend, dtype, head_dim, causal):
    device = device_of(backend, dtype)
    q, k, v = random_qkv(device, dtype, 1, (150, 333), (4, 2), head_dim)
    assert_right(q, k, v, backend, causal=causal)


@pytest.mark.parametrize("heads", [(1, 1), (5, 1), (8, 8), (16, 1), (12, 3)], ids=str)
def test_groups(backend, dtype, heads):
    device = device_of(backend, dtype)
    assert_right(*random_qkv(device, dtype, 2, (65, 130), heads, 64), backend, causal=True)


PAIRS = [
    pair
    for pair in itertools.combinations(list(OPTIONS)[1:], 2)
    if not OPTIONS[pair[0]].keys() & OPTIONS[pair[1]].keys()
]


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_pairs_of_features(backend, pair):
    device = device_of(backend, torch.float16)
    options = with_tensors(OPTIONS[pair[0]] | OPTIONS[pair[1]], 4, device)
    assert_right(*random_qkv(device, torch.float16, 1, (129, 301), (4, 2), 128), backend, **options)


@pytest.mark.parametrize("seqlen", [799, 1023, 4224])
@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences(backend, seqlen, causal):
    if backend == "cpu" and seqlen > 2000:
        pytest.skip("the float64 truth of it takes minutes on a CPU")
    dtype = torch.float32 if backend == "simt" else torch.float16
    device = device_of(backend, dtype)
    assert_right(
        *random_qkv(device, dtype, 1, (seqlen, seqlen), (2, 1), 64), backend, causal=causal
    )


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("lengths", [(300, 300), (130, 2100)], ids=str)
@pytest.mark.parametrize("name", ["full", "causal", "causal window"])
def test_more_tiles_than_places(backend, head_dim, lengths, name):
    """A block of a persistent kernel takes several tiles, one beside the end of another."""
    if backend == "cpu":
        pytest.skip("no kernel of the CPU is persistent")
    dtype = torch.bfloat16 if backend == "sm90" else torch.float16
    device = device_of(backend, dtype)
    qkv = random_qkv(device, dtype, 16, lengths, (16, 8), head_dim)
    assert_right(*qkv, backend, **OPTIONS[name])


@pytest.mark.parametrize("size", ["one", "tiny", "max"])
def test_a_row_that_sees_one_key_gives_its_value(dtype, size):
    # The largest weight is exactly 1 on the CPU, so nothing is rounded, nothing overflows, and
    # nothing that is normal becomes less.
    largest = {"one": 1.0, "tiny": 4 * torch.finfo(dtype).tiny, "max": torch.finfo(dtype).max}[size]
    v = ((1 + torch.rand(1, 130, 2, 64)) / 2 * largest).to(dtype)
    q, k = torch.randn(2, 1, 130, 2, 64).to(dtype)
    assert torch.equal(flash_attn(q, k[:, :1], v[:, :1])[0], v[:, :1].expand_as(q))
    assert torch.equal(flash_attn(q, k, v, causal=True)[0][:, 0], v[:, 0])


def test_large_scores_and_one_hot_rows(backend, dtype):
    device = device_of(backend, dtype)
    q, k, v = random_qkv(device, dtype, 1, (70, 300), (2, 2), 64, scale=100.0)
    assert_right(q, k, v, backend)
    out, _ = flash_attn(k[:, :64] * 40, k, v, backend=backend, softmax_scale=10.0)
    torch.testing.assert_close(out, v[:, :64])


def test_runs_are_equal_to_the_bit(backend, dtype):
    device = device_of(backend, dtype)
    q, k, v = random_qkv(device, dtype, 2, (300, 300), (4, 2), 128)
    first = flash_attn(q, k, v, causal=True, backend=backend)
    for _ in range(100 if device.type == "cuda" else 5):
        for a, b in zip(flash_attn(q, k, v, causal=True, backend=backend), first, strict=True):
            assert torch.equal(a, b)


def test_any_strides_and_offsets(device, dtype):
    q, k, v = random_qkv(device, dtype, 2, (90, 90), (4, 4), 64)
    out, lse = flash_attn(q, k, v, causal=True)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    qkv = torch.stack([q, k, v], 2)
    odd = torch.full((2, 90, 4, 3 * 64 + 1), torch.nan, dtype=dtype, device=device)
    views = odd[..., 1:].unflatten(-1, (3, 64)).unbind(-2)  # no row at a multiple of 16 bytes
    for view, x in zip(views, (q, k, v), strict=True):
        view.copy_(x)
    one_key = [x[:, :1].expand(-1, 90, -1, -1) for x in (k, v)]  # token stride 0
    copies = [x.contiguous() for x in one_key]
    torch.testing.assert_close(flash_attn(q, *one_key)[0], flash_attn(q, *copies)[0])
    for others in (heads_first, qkv.unbind(2), views):
        other_out, other_lse = flash_attn(*others, causal=True)
        if others is not views or device.type == "cpu":
            assert torch.equal(other_out, out)
            assert torch.equal(other_lse, lse)
        else:  # another implementation
            out64, _ = reference.flash_attn(q.double(), k.double(), v.double(), causal=True)
            assert_within_2x(other_out, torch_attention(q, k, v, causal=True), out64)


def test_a_sink_that_is_no_number_shows_in_its_head_alone(backend, dtype):
    device = device_of(backend, dtype)
    q, k, v = random_qkv(device, dtype, 2, (40, 60), (4, 2))
    sinks = torch.randn(4, device=device)
    clean = flash_attn(q, k, v, sinks=sinks, backend=backend)
    sinks[2] = torch.nan
    out, lse = flash_attn(q, k, v, sinks=sinks, backend=backend)
    assert out[:, :, 2].isnan().all()
    assert lse[:, 2].isnan().all()
    others = torch.tensor([0, 1, 3], device=device)
    assert torch.equal(out[:, :, others], clean[0][:, :, others])
    assert torch.equal(lse[:, others], clean[1][:, others])


def test_alibi_slopes_of_each_sequence(device):
    q, k, v = random_qkv(device, torch.float32, 3, (40, 60))
    assert_right(q, k, v, alibi_slopes=torch.rand(3, 6, device=device))


def test_nothing_to_do(device, dtype):
    for shape in ((0, 5, 6, 64), (2, 0, 6, 64)):
        q = torch.empty(shape, dtype=dtype, device=device)
        k = torch.empty(shape[0], 7, 2, 64, dtype=dtype, device=device)
        out, lse = flash_attn(q, k, k)
        assert out.shape == q.shape
        assert lse.shape == (shape[0], 6, shape[1])
    q, k, _ = random_qkv(device, dtype, 2, (5, 0))
    out, lse = flash_attn(q, k, k)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@given(
    st.integers(1, 3),
    st.tuples(st.integers(0, 150), st.integers(0, 150)),
    st.tuples(st.integers(1, 4), st.integers(1, 3)),
    st.integers(1, 32),
    st.booleans(),
    st.tuples(st.integers(-1, 60), st.integers(-1, 60)),
    st.sampled_from([0.0, 4.0]),
)
def test_any_case(batch, lengths, heads, eighths, causal, window_size, softcap):
    torch.manual_seed(0)
    group, heads_kv = heads
    qkv = random_qkv(
        "cpu", torch.float32, batch, lengths, (group * heads_kv, heads_kv), 8 * eighths
    )
    options = {"causal": causal, "window_size": window_size, "softcap": softcap}
    out, _ = flash_attn(*qkv, **options)
    out64, _ = reference.flash_attn(*(x.double() for x in qkv), **options)
    out32, _ = reference.flash_attn(*qkv, **options)
    assert_within_2x(out, out32, out64)


def test_a_sequence_does_not_depend_on_its_neighbours(device, dtype):
    q, k, v = random_qkv(device, dtype, 3, (200, 200))
    out, lse = flash_attn(q, k, v, causal=True)
    for b in range(3):
        alone = flash_attn(*(x[b : b + 1] for x in (q, k, v)), causal=True)
        assert torch.equal(alone[0], out[b : b + 1])
        assert torch.equal(alone[1], lse[b : b + 1])


def test_refusals(device):
    q, k, v = random_qkv(device, torch.float32, 2, (5, 9), (6, 2), 64)

    def refuses(*parts, tensors=(q, k, v), **options):
        assert_refuses(lambda: flash_attn(*tensors, **options), "flash_attn: ", *parts)

    refuses("q must be [batch, seqlen_q, num_heads_q, head_dim], got", tensors=(q[0], k, v))
    refuses("k must be [batch, seqlen_k, num_heads_kv, head_dim], got", tensors=(q, k[0], v))
    refuses("v must be", "= [2, 9, 2, 64], got shape [2, 8, 2, 64]", tensors=(q, k, v[:, :8]))
    refuses("k must be", "= [2, 9, 2, 64]", tensors=(q, k[:1], v[:1]))
    refuses("q must be float32, float16 or bfloat16", tensors=(q.double(), k, v))
    refuses("k must have the dtype of q (float32)", tensors=(q, k.half(), v))
    refuses(
        "head_dim must be a multiple of 8 up to 256, got 60",
        tensors=[x[..., :60] for x in (q, k, v)],
    )
    refuses("head_dim must be a multiple of 8 up", tensors=[x[..., :0] for x in (q, k, v)])
    refuses(
        "num_heads_q must be a multiple of num_heads_kv = 2, got 5", tensors=(q[:, :, :5], k, v)
    )
    refuses("q must have a contiguous last", tensors=(q.repeat(1, 1, 1, 2)[..., ::2], k, v))
    refuses("window_left must be at least -1, got -2", window_size=(-2, 0))
    refuses("window_right must be at least -1, got -3", window_size=(0, -3))
    refuses("softcap must lie in [0, 10000] (0: off), got -1", softcap=-1.0)
    refuses("softcap must lie in [0, 10000]", softcap=1e5)
    refuses("softmax_scale must be finite", softmax_scale=torch.nan)
    refuses("sinks must be [num_heads_q] = [6], got", sinks=torch.zeros(5, device=device))
    refuses("sinks must be float32, got float64", sinks=torch.zeros(6, device=device).double())
    refuses("alibi_slopes must be [num_heads_q] = [6]", alibi_slopes=torch.zeros(5, device=device))
    slopes = torch.zeros(3, 6, device=device)
    refuses("alibi_slopes must be [batch, num_heads_q] = [2, 6]", alibi_slopes=slopes)
    refuses(
        "backend must be None or one of cpu, decode, decode_sm75, sm75",
        'got "cudnn"',
        backend="cudnn",
    )
    other = "simt" if device.type == "cpu" else "cpu"
    where = "the CPU" if device.type == "cpu" else "a GPU"
    refuses(f"backend must serve the call, got {other}: the tensors are on {where}", backend=other)
    with torch.inference_mode(False), torch.enable_grad():
        grad = torch.ones(2, 5, 6, 64, device=device, requires_grad=True)
        refuses("q must not require grad", tensors=(grad, k, v))
        refuses("sinks must not require grad", sinks=torch.zeros(6, requires_grad=True))


@pytest.mark.parametrize("seqlen", [0, 1, 70])
def test_opcheck(device, dtype, seqlen):
    q, k, v = (x.contiguous() for x in random_qkv(device, dtype, 2, (seqlen, 40)))
    sinks, slopes = torch.randn(6, device=device), torch.rand(6, device=device)
    run_opcheck("flash_attn", q, k, v, None, None, 0.125, True, -1, -1, 0.0, None)
    named = "cpu" if device.type == "cpu" else None
    run_opcheck("flash_attn", q, k, v, sinks, slopes, 0.125, False, 9, 9, 5.0, named)


def test_is_torch_attention(device, dtype):
    q, k, v = random_qkv(device, dtype, 2, (128, 128), (4, 4))
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    torch.testing.assert_close(flash_attn(q, k, v, causal=True)[0], theirs, atol=2e-2, rtol=2e-2)


def test_replay_with_other_values(device, dtype):
    first, second = (
        tuple(x.contiguous() for x in random_qkv(device, dtype, 2, (130, 200))) for _ in range(2)
    )
    assert_replays(lambda q, k, v: flash_attn(q, k, v, causal=True), first, second)


def test_compile(device):
    inputs = [
        tuple(x.contiguous() for x in random_qkv(device, torch.float16, 2, (n, n + 3)))
        for n in (40, 77, 130)
    ]
    assert_compiles(lambda q, k, v: flash_attn(q, k, v, causal=True), inputs)


@pytest.mark.parametrize("dtype", [torch.float16])
def test_more_than_2_to_the_31_elements(backend, dtype):
    """Offsets past 2^31 elements, in the batch and in the token."""
    if backend == "cpu":
        pytest.skip("takes 20 GB and minutes on a CPU")
    device = device_of(backend, dtype)
    k = torch.randn(2, 64, 1, 128, device=device, dtype=dtype)
    q = torch.zeros(2, 2**31 // 256 + 100, 2, 128, device=device, dtype=dtype)
    q[:, -64:] = torch.randn(2, 64, 2, 128)
    out, _ = flash_attn(q, k, k, backend=backend)
    last, _ = flash_attn(q[:, -64:], k, k, backend=backend)
    torch.testing.assert_close(out[:, -64:], last)
