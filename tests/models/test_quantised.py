"""Patched models with packed weights: merged, restored, and recorded as one replay a token."""

from __future__ import annotations

import copy

import pytest
import torch
from families import LAYERS, QUANTISED, VOCAB, OpCounter, PackedRun, quantise_, tiny_model
from tolerance import assert_within_2x

from llamatelemetry.inference.recording import Recording
from llamatelemetry.models.patching import forward_tokens, patch, unpatch
from llamatelemetry.models.pieces.merge import in_more_bits

# Q and K alike, V and MLP not: what can be merged is, the rest runs one by one.
MIXED = ("Q4_1", "Q4_1", "Q8_0", "Q4_1", "Q8_0", "Q8_0", "Q5_0")  # q, k, v, o, gate, up, down


@pytest.fixture(params=[("Q4_1",), MIXED], ids=["alike", "mixed"])
def formats(request):
    return request.param


def dense_twin(model, dtype):
    twin = in_more_bits(model, dtype, None)
    weight = twin.lm_head.weight  # the embedding's too
    twin.model.embed_tokens = torch.nn.Embedding.from_pretrained(weight)
    return twin


@pytest.mark.parametrize("family", QUANTISED)
def test_packed_logits(family, formats, device, dtype):
    model = tiny_model(family, device, dtype)
    quantise_(model, formats)
    more_bits = torch.float64 if dtype == torch.float32 else torch.float32
    truth = dense_twin(model, more_bits)
    ids = torch.randint(VOCAB, (9,), device=device)
    theirs, exact = model(ids[None]).logits[0], truth(ids[None]).logits[0]

    report = patch(model)
    assert report.refused == {}
    run = PackedRun(model, 1)
    for begin, end in ((0, 6), (6, 7), (7, 9)):
        assert_within_2x(run.step([ids[begin:end]])[0], theirs[end - 1], exact[end - 1])
    assert_within_2x(model(ids[None]).logits[0], theirs, exact)


def test_state_dict_and_unpatch(formats, device):
    model = tiny_model("qwen2", device)
    quantise_(model, formats)
    ids = torch.randint(VOCAB, (2, 5), device=device)
    state, before = copy.deepcopy(model.state_dict()), model(ids).logits

    def same_state():
        now = model.state_dict()
        return list(now) == list(state) and all(torch.equal(now[k], state[k]) for k in state)

    patch(model)
    q, k = model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj
    assert same_state()
    unpatch(model)
    assert same_state()
    assert q.weight.untyped_storage().data_ptr() != k.weight.untyped_storage().data_ptr()
    assert torch.equal(model(ids).logits, before)


def test_a_decode_step_is_recorded():
    """Nothing but our ops and views, eight of ours a layer: a replay gives what the step gives."""
    model = tiny_model("llama")
    quantise_(model)
    patch(model)
    prompts = [torch.randint(VOCAB, (n,)) for n in (5, 2)]
    runs = [PackedRun(model, 2), PackedRun(model, 2)]
    for run in runs:
        torch.manual_seed(1)
        run.table = torch.randperm(run.table.numel()).view_as(run.table).int()
        run.step(prompts)
    eager, recorded = runs
    tokens = torch.randint(VOCAB, (4, 2))
    with OpCounter() as counter:
        expected = [eager.step(list(row.view(2, 1))) for row in tokens]
    num_ours = sum(n for op, n in counter.calls.items() if op.startswith("llamatelemetry::"))
    assert num_ours == len(tokens) * (8 * LAYERS + 3)

    ids, step = tokens[0].clone(), recorded.input([1, 1])
    with Recording() as recording:
        logits = forward_tokens(model, ids, step, recorded.state)
    assert torch.equal(logits, expected[0])
    for row, want in zip(tokens[1:], expected[1:], strict=True):
        following = recorded.input([1, 1])
        ids.copy_(row)
        for name in ("positions", "slot_mapping", "cache_seqlens"):
            getattr(step, name).copy_(getattr(following, name))
        recording.replay()
        assert torch.equal(logits, want)
