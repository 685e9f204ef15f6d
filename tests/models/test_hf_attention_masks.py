"""key_mask reads as sdpa_mask's matrix; attention by its rules is attention by that matrix."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import masking_utils
from transformers.masking_utils import sdpa_mask

from llamatelemetry.models import hf_kernels
from llamatelemetry.models.hf_attention import attention_forward
from llamatelemetry.models.hf_masks import KeyMask, dense_mask, key_mask

RULES = {
    "causal": lambda: masking_utils.causal_mask_function,
    "bidirectional": lambda: masking_utils.bidirectional_mask_function,
    "window": lambda: masking_utils.sliding_window_causal_mask_function(3),
    "wide_window": lambda: masking_utils.sliding_window_causal_mask_function(99),
    "both_ways": lambda: masking_utils.sliding_window_bidirectional_mask_function(2),
    "chunks": lambda: masking_utils.chunked_causal_mask_function(4, torch.zeros(2).long()),
    "one_chunk": lambda: masking_utils.chunked_causal_mask_function(99, torch.zeros(2).long()),
    "packed": lambda: masking_utils.and_masks(
        masking_utils.causal_mask_function,
        masking_utils.packed_sequence_mask_function(torch.arange(2 * 64).view(2, 64) // 3),
    ),
}
KNOWN = ("causal", "bidirectional", "window", "wide_window", "both_ways", "one_chunk")


class Module(torch.nn.Module):
    num_key_value_groups = 2
    is_causal = True


@st.composite
def calls(draw):
    """Arguments of a mask function: a static or growing cache, padding anywhere."""
    rules = draw(st.sampled_from(sorted(RULES)))
    seqlen_q = draw(st.integers(1, 9))
    past = draw(st.integers(0, 6))
    ahead = draw(st.integers(0, 3))  # empty slots of a static cache
    kv = past + seqlen_q + ahead
    padding = draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=2 * kv, max_size=2 * kv)))
    mask = None if padding is None else torch.tensor(padding).view(2, kv)
    offset = torch.tensor(past) if draw(st.booleans()) else past
    return rules, {
        "batch_size": 2,
        "q_length": seqlen_q,
        "kv_length": kv,
        "q_offset": offset,
        "mask_function": RULES[rules](),
        "attention_mask": mask,
    }


@given(calls())
def test_reads_as_the_matrix(call):
    rules, arguments = call
    ours = key_mask(**arguments)
    theirs = sdpa_mask(**arguments, allow_is_causal_skip=False)
    assert isinstance(ours, KeyMask) or rules not in KNOWN
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.bool
    assert torch.equal(ours & True, theirs)
    assert torch.equal(ours[:, :, -1:, :3], theirs[:, :, -1:, :3])
    assert torch.equal(torch.where(ours, 0.0, -1.0), torch.where(theirs, 0.0, -1.0))
    assert torch.equal(copy.deepcopy(ours) != 0, theirs)
    assert torch.equal(dense_mask(ours, 0, 0, None, ours.device), theirs)


@given(
    calls(),
    st.booleans(),
    st.sampled_from([(16, 16), (24, 16), (16, 24), (20, 12)]),
    st.sampled_from([None, 3.0]),
    st.integers(0, 99),
)
def test_attention_by_rules_is_attention_by_the_matrix(call, sinks, widths, softcap, seed):
    _, arguments = call
    generator = torch.Generator().manual_seed(seed)
    seqlen_q, seqlen_k = arguments["q_length"], arguments["kv_length"]
    q = torch.randn(2, 4, seqlen_q, widths[0], generator=generator)
    k = torch.randn(2, 2, seqlen_k, widths[0], generator=generator)
    v = torch.randn(2, 2, seqlen_k, widths[1], generator=generator)
    s_aux = torch.randn(4, generator=generator) if sinks else None
    mask = key_mask(**arguments)
    out, _ = attention_forward(Module(), q, k, v, mask, scaling=0.3, softcap=softcap, s_aux=s_aux)
    matrix = sdpa_mask(**arguments, allow_is_causal_skip=False)
    scores = q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3) * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~matrix, -torch.inf)
    if sinks:
        sink = s_aux.double().view(1, 4, 1, 1).expand(2, -1, seqlen_q, 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1)[..., :seqlen_k]
    want = (weights @ v.double().repeat_interleave(2, 1)).transpose(1, 2).float()
    sees = matrix.any(-1).transpose(1, 2)[..., None]
    assert out.is_contiguous()
    assert_close(torch.where(sees, out, 0.0), torch.where(sees, want, 0.0), rtol=1e-4, atol=1e-5)


def qkv(heads_kv=2, seqlen_q=7, seqlen_k=7, head_dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, seqlen_q, head_dim)] + 2 * [(2, heads_kv, seqlen_k, head_dim)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def matrix_attention(q, k, v, seen=None, scale=None):
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=scale
    ).transpose(1, 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("said_by", ["module", "argument"])
def test_without_a_mask_causality_is_the_modules_or_the_arguments(causal, said_by):
    q, k, v = qkv()
    module = Module()
    module.is_causal = causal if said_by == "module" else not causal
    options = {} if said_by == "module" else {"is_causal": causal}
    out, _ = attention_forward(module, q, k, v, None, **options)
    seen = torch.ones(7, 7).tril().bool() if causal else None
    assert_close(out, matrix_attention(q, k, v, seen))


def test_a_mask_outweighs_is_causal():
    q, k, v = qkv()
    everything = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    out, _ = attention_forward(Module(), q, k, v, everything, is_causal=True)
    assert_close(out, matrix_attention(q, k, v))


def test_without_a_mask_the_window_counts():
    q, k, v = qkv()
    out, _ = attention_forward(Module(), q, k, v, None, sliding_window=3)
    seen = torch.ones(7, 7).tril().triu(-2).bool()
    assert_close(out, matrix_attention(q, k, v, seen))


def test_without_a_mask_causal_queries_stand_at_the_first_slots():
    """An empty static cache is longer than its prompt."""
    q, k, v = qkv(seqlen_k=11)
    k[:, :, 7:] = v[:, :, 7:] = torch.nan
    out, _ = attention_forward(Module(), q, k, v, None)
    seen = torch.ones(7, 7).tril().bool()
    assert_close(out, matrix_attention(q, k[:, :, :7], v[:, :, :7], seen))
    one = q[:, :, :1]
    k, v = k[:, :, :7], v[:, :, :7]
    out, _ = attention_forward(Module(), one, k, v, None)
    assert_close(out, matrix_attention(one, k, v))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_kernels_do_not_take_is_torchs(dtype):
    """float64, and k and v of another dtype."""
    q, k, v = qkv(dtype=dtype)
    out, _ = attention_forward(Module(), q, k, v, None, is_causal=False)
    assert_close(out, matrix_attention(q, k, v))
    assert out.dtype == dtype


def test_wide_heads_are_torchs_and_that_is_said_once():
    q, k, v = qkv(head_dim=320)
    hf_kernels._said.clear()
    with pytest.warns(UserWarning, match=r"head_dim must be at most 256, got 320; torch's own"):
        out, _ = attention_forward(Module(), q, k, v, None, is_causal=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention_forward(Module(), q, k, v, None, is_causal=False)
    assert_close(out, matrix_attention(q, k, v))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [True, False])
def test_modules_without_an_eager_attention_of_their_own(softcap, sinks):
    """Gradients with softcap and sinks where a module's file has nothing to fall back to."""
    with torch.inference_mode(False), torch.enable_grad():
        q, k, v = (x.requires_grad_() for x in qkv())
        s_aux = torch.zeros(4, requires_grad=True) if sinks else None
        options = {"softcap": softcap, "s_aux": s_aux}
        out, _ = attention_forward(Module(), q, k, v, None, **options)
        out.square().sum().backward()
        assert q.grad is not None
    detached = [x.detach() for x in (q, k, v)]
    options["s_aux"] = None if s_aux is None else s_aux.detach()
    assert_close(out.detach(), attention_forward(Module(), *detached, None, **options)[0])
