"""rotary_embedding_: values, refusals, opcheck, reference, replay; compile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as turn_pairs
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as turn_halves

from llamatelemetry.ops import reference, rotary_embedding_


def case(device, dtype, num_tokens=5, heads=(4, 2), head_dim=64, rotary_dim=None, positions=None):
    """q and k (slices of one merged qkv), cos and sin."""
    qkv = torch.randn(num_tokens, heads[0] + 2 * heads[1], head_dim, dtype=dtype, device=device)
    half = (rotary_dim or head_dim) // 2
    frequency = 10000.0 ** -(torch.arange(half, device=device) / half)
    angles = torch.arange(positions or num_tokens, device=device)[:, None] * frequency
    cos, sin = (torch.cat([f(angles)] * 2, -1).to(dtype) for f in (torch.cos, torch.sin))
    q, k, _ = qkv.split([heads[0], heads[1], heads[1]], 1)
    return q, k, cos, sin


def transformers_turn(q, k, cos, sin, interleaved):
    """What the module of transformers gives for q, k [num_tokens, heads, head_dim]."""
    rotary_dim = cos.shape[-1]
    parts = [(x[None, ..., :rotary_dim], x[..., rotary_dim:]) for x in (q, k)]
    turn = turn_pairs if interleaved else turn_halves
    turned = turn(parts[0][0], parts[1][0], cos[None], sin[None], unsqueeze_dim=2)
    return [torch.cat([a[0], rest], -1) for a, (_, rest) in zip(turned, parts, strict=True)]


def as_given(cos, sin, interleaved):
    """Angles in halves, spread over pairs where pairs are turned."""
    half = cos.shape[-1] // 2
    return [x[:, :half].repeat_interleave(2, -1) if interleaved else x for x in (cos, sin)]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(64, 64), (128, 32), (80, 80), (6, 2), (100, 50), (256, 256)]
)
def test_values(device, dtype, head_dim, rotary_dim, interleaved):
    q, k, cos, sin = case(device, dtype, head_dim=head_dim, rotary_dim=rotary_dim)
    expected = transformers_turn(q, k, cos, sin, interleaved)
    rotary_embedding_(q, k, *as_given(cos, sin, interleaved), interleaved=interleaved)
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_positions(device, dtype, index_dtype):
    q, k, cos, sin = case(device, dtype, positions=40)
    positions = torch.tensor([39, 0, 7, 7, 21], dtype=index_dtype, device=device)
    rows = positions.long()
    expected = transformers_turn(q, k, cos[rows], sin[rows], interleaved=False)
    rotary_embedding_(q, k, cos, sin, positions)
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])


@pytest.mark.parametrize("interleaved", [False, True])
def test_position_outside_the_table_is_nan(device, interleaved):
    q, k, cos, sin = case(device, torch.float32, head_dim=64, rotary_dim=32)
    before = q.clone()
    positions = torch.tensor([0, -1, 5, 2**40, 4], device=device)
    rotary_embedding_(q, k, cos, sin, positions, interleaved)
    for x in (q, k):
        assert x[1:4, :, :32].isnan().all()
        assert not x[[0, 4]].isnan().any()
    assert torch.equal(q[..., 32:], before[..., 32:])


@given(
    st.integers(1, 4),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.integers(1, 40),
    st.integers(0, 5),
    st.booleans(),
)
def test_any_strides(num_tokens, heads, half, gap, interleaved):
    head_dim = 2 * half + 1
    q, k, cos, sin = case("cpu", torch.float32, num_tokens, heads, head_dim, 2 * half)
    # Heads first, with unwritten memory between them.
    wide = [torch.full((n, num_tokens, head_dim + gap), torch.nan) for n in heads]
    wide_q, wide_k = (x[..., :head_dim].transpose(0, 1) for x in wide)
    wide_q.copy_(q)
    wide_k.copy_(k)
    rotary_embedding_(q, k, cos, sin, interleaved=interleaved)
    rotary_embedding_(wide_q, wide_k, cos, sin, interleaved=interleaved)
    assert torch.equal(q, wide_q)
    assert torch.equal(k, wide_k)
    assert all(x[..., head_dim:].isnan().all() for x in wide)


def test_refusals(device):
    q, k, cos, sin = case(device, torch.float32)
    f = rotary_embedding_
    assert_refuses(lambda: f(q[0], k, cos, sin), "q must be [num_tokens, num_heads, head_dim]")
    assert_refuses(lambda: f(q, k[:1], cos, sin), "k must be", "q's tokens and head_dim")
    assert_refuses(lambda: f(q, k.half(), cos, sin), "k must have the dtype of q")
    assert_refuses(lambda: f(q, k, cos[:, :5], sin), "cos must have an even rotary_dim", "got 5")
    wide = torch.cat([cos, cos], -1)
    assert_refuses(lambda: f(q, k, wide, wide), "cos must", "<= head_dim = 64", "got 128")
    assert_refuses(lambda: f(q, k, cos, sin[:2]), "sin must be the shape of cos")
    assert_refuses(lambda: f(q, k, cos[:2], sin[:2]), "cos must have a row for each of the 5")
    positions = torch.arange(5, device=device)
    assert_refuses(lambda: f(q, k, cos, sin, positions.half()), "positions must be int64 or int32")
    assert_refuses(lambda: f(q, k, cos, sin, positions[:3]), "positions must be [num_tokens] = [5]")
    assert_refuses(lambda: f(q[:1].expand(5, 4, 64), k, cos, sin), "q must not overlap itself")
    with torch.inference_mode(False), torch.enable_grad():
        grad = torch.randn(5, 4, 64, device=device, requires_grad=True)
        plain = torch.randn(5, 64, device=device)
        assert_refuses(lambda: f(grad, grad, plain, plain), "q must not require grad")


def test_opcheck(device, dtype):
    q, k, cos, sin = case(device, dtype, positions=9)
    q, k = q.contiguous(), k.contiguous()
    positions = torch.tensor([8, 0, 3, 3, 1], device=device)
    run_opcheck("rotary_embedding_", q, k, cos, sin, positions, False)
    run_opcheck("rotary_embedding_", q, k, cos, sin, None, True)
    run_opcheck("rotary_embedding_", q[:0], k[:0], cos, sin, None, True)


@pytest.mark.parametrize("interleaved", [False, True])
def test_reference(device, interleaved):
    q, k, cos, sin = (x.double() for x in case(device, torch.float32, rotary_dim=48))
    expected = transformers_turn(q, k, cos, sin, interleaved)
    reference.rotary_embedding_(q, k, *as_given(cos, sin, interleaved), None, interleaved)
    torch.testing.assert_close([q, k], expected)


def test_replay(device, dtype):
    def inputs(positions):
        q, k, cos, sin = case(device, dtype, positions=9)
        return q.contiguous(), k.contiguous(), cos, sin, torch.tensor(positions, device=device)

    assert_replays(rotary_embedding_, inputs([0, 1, 2, 3, 4]), inputs([8, 0, 3, 3, 1]))


def test_compile(device):
    assert_compiles(
        rotary_embedding_,
        [
            tuple(x.contiguous() for x in case(device, torch.float32, num_tokens=n))
            for n in (3, 5, 9)  # 2 would be taken for the heads of k
        ],
    )
