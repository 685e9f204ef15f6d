"""merge_attn_states: values, refusals, opcheck, reference, replay; compile."""

from __future__ import annotations

import pytest
import torch
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck
from tolerance import assert_within_2x

from llamatelemetry.ops import merge_attn_states, reference
from llamatelemetry.ops.reference.attention import attention


def random_case(device, dtype, num_tokens=7, num_heads=3, head_dim=24):
    """Two parts of which one, the other or both saw no key in some rows."""
    outs = torch.randn(2, num_tokens, num_heads, head_dim, device=device).to(dtype)
    lses = 4 * torch.randn(2, num_heads, num_tokens, device=device)
    for part, seen in enumerate((slice(0, 2), slice(1, 3))):
        lses[part, :, seen] = -torch.inf
        outs[part, seen] = torch.nan
    return outs[0], lses[0], outs[1], lses[1]


@pytest.mark.parametrize("head_dim", [1, 8, 24, 128, 256, 264])
@pytest.mark.parametrize(("num_tokens", "num_heads"), [(0, 3), (1, 1), (7, 3), (33, 32)])
def test_values(device, dtype, num_tokens, num_heads, head_dim):
    case = random_case(device, dtype, num_tokens, num_heads, head_dim)
    out, lse = merge_attn_states(*case)
    in_32 = reference.merge_attn_states(*(x.float() for x in case))
    in_64 = reference.merge_attn_states(*(x.double() for x in case))
    in_64 = [x.nan_to_num(nan=-torch.inf) if i else x.nan_to_num() for i, x in enumerate(in_64)]
    assert_within_2x(out, in_32[0].nan_to_num().to(dtype), in_64[0])
    assert_within_2x(lse, in_32[1], in_64[1])
    assert num_tokens < 2 or not out[1].any()


def test_refusals(device):
    names = ("out_a", "lse_a", "out_b", "lse_b")
    case = dict(zip(names, random_case(device, torch.float32), strict=True))

    def refuses(*parts, **changed):
        args = (case | changed).values()
        assert_refuses(lambda: merge_attn_states(*args), "merge_attn_states: ", *parts)

    refuses("out_a must be [num_tokens, num_heads, head_dim], got", out_a=case["out_a"][0])
    refuses("out_b must be the shape of out_a = [7, 3, 24]", out_b=case["out_b"][1:])
    refuses("out_b must have the dtype of out_a", out_b=case["out_b"].half())
    refuses("lse_a must be [num_heads, num_tokens] = [3, 7]", lse_a=case["lse_a"].T)
    refuses("lse_b must be float32, got float16", lse_b=case["lse_b"].half())
    refuses(
        "out_b must be contiguous", out_b=case["out_b"].transpose(0, 2).contiguous().transpose(0, 2)
    )
    with torch.inference_mode(False), torch.enable_grad():
        refuses("out_a must not require grad", out_a=torch.ones(1, requires_grad=True))


def test_opcheck(device, dtype):
    run_opcheck("merge_attn_states", *random_case(device, dtype))
    run_opcheck("merge_attn_states", *random_case(device, dtype, num_tokens=0))


def test_reference_is_attention_over_all_keys(device):
    q, k, v = torch.randn(3, 9, 4, 16, device=device, dtype=torch.float64)
    whole = attention(q, k, v)
    parts = [attention(q, k[keys], v[keys]) for keys in (slice(0, 4), slice(4, 9))]
    for a, b in zip(reference.merge_attn_states(*parts[0], *parts[1]), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_replay(device, dtype):
    assert_replays(merge_attn_states, random_case(device, dtype), random_case(device, dtype))


def test_compile(device):
    cases = [random_case(device, torch.float32, n) for n in (5, 7, 9)]
    assert_compiles(merge_attn_states, cases)
