"""The packed forward gives transformers' logits: ragged prompts, chunks, decode steps."""

from __future__ import annotations

import pytest
import torch
from families import IN_DTYPES, VOCAB, PackedRun, tiny_model
from tolerance import assert_within_2x

from llamatelemetry.models.patching import forward_tokens, patch, rope_tables


@pytest.mark.parametrize(("family", "dtype"), IN_DTYPES)
def test_packed_logits_are_those_of_transformers(family, device, dtype):
    model = tiny_model(family, device, dtype)
    truth = tiny_model(family, device, torch.float64)
    truth.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    lengths, num_steps = (7, 3, 11), 4
    sequences = [torch.randint(VOCAB, (n + num_steps,), device=device) for n in lengths]
    theirs = [model(s[None]).logits[0] for s in sequences]
    exact = [truth(s[None]).logits[0] for s in sequences]

    patch(model)
    run = PackedRun(model, len(lengths))
    ends = [[2, 1, 3], list(lengths)] + [[n + i + 1 for n in lengths] for i in range(num_steps)]
    begins = [[0] * len(lengths), *ends[:-1]]
    ours = [
        run.step([s[b:e] for s, b, e in zip(sequences, begin, end, strict=True)])
        for begin, end in zip(begins, ends, strict=True)
    ]
    same_dtype, ref64 = (
        torch.stack([x[e - 1] for end in ends for x, e in zip(logits, end, strict=True)])
        for logits in (theirs, exact)
    )
    assert_within_2x(torch.cat(ours), same_dtype, ref64)


def test_an_unpatched_model_is_refused():
    with pytest.raises(ValueError, match="must be patched as a whole, got it is not patched"):
        forward_tokens(tiny_model("llama"), torch.zeros(1, dtype=torch.long), None, None)


def test_a_rope_that_depends_on_the_length_is_refused():
    model = tiny_model("llama")
    model.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(ValueError, match="got 'dynamic'"):
        rope_tables(model, 8)
