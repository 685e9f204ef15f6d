"""transformers' models give with our attention what they give with their own eager one."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from families import OpCounter
from hf_models import CASES, SEQLEN, VOCAB, build, build_exact, inputs_of, result
from tolerance import assert_within_2x
from torch.testing import assert_close

from llamatelemetry.inference.flash_attn import disable_flash_attention, enable_flash_attention
from llamatelemetry.models.hf_attention import NAME
from llamatelemetry.models.hf_masks import KeyMask

OURS = ("llamatelemetry::flash_attn", "llamatelemetry::paged_attention")
PADDED = [name for name, case in CASES.items() if case.kind in ("causal", "encoder", "seq2seq")]


def cases_and_sides():
    return [
        (name, side)
        for name in CASES
        for side in ("none", "left", "right")
        if side == "none" or name in PADDED
    ]


def counted(call):
    with OpCounter() as counter:
        call()
    ours = sum(counter.calls[name] for name in OURS)
    return ours, [name for name in counter.calls if "scaled_dot_product" in name]


@pytest.mark.parametrize(("name", "side"), cases_and_sides())
def test_outputs(name, side, device):
    inputs = inputs_of(name, side, device)
    exact = result(build_exact(name, device=device), inputs)
    model = build(name, device=device)
    theirs = result(model, inputs)
    enable_flash_attention(model)
    assert model.config._attn_implementation == NAME
    assert_within_2x(result(model, inputs), theirs, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "deepseek_v3", "bert", "llama_head_dim_20"])
def test_outputs_in_half_precision(name, dtype, device):
    inputs = inputs_of(name, "left", device)
    model = build(name, dtype=dtype, device=device)
    exact, theirs = result(build_exact(name, model, device), inputs), result(model, inputs)
    enable_flash_attention(model)
    assert_within_2x(result(model, inputs), theirs, exact)


# Position biases are added to scores, and torch's attention serves wider heads.
_NOT_OURS = {"t5", "bigbird_pegasus", "llama_head_dim_264", "doge", "llama4_chunked"}


@pytest.mark.parametrize(
    ("name", "side"), [case for case in cases_and_sides() if case[0] not in _NOT_OURS]
)
def test_attention_is_ours(name, side, device):
    """With padding too: nothing falls back to torch's attention, which would be right as well."""
    model = enable_flash_attention(build(name, device=device))
    ours, theirs = counted(lambda: result(model, inputs_of(name, side, device)))
    assert ours
    assert theirs == []


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "llama", "bert", "deepseek_v3", "mistral"])
def test_gradients_are_eager_attentions(name, device):
    def gradients(model):
        with torch.inference_mode(False), torch.enable_grad():
            inputs = {k: v.clone() for k, v in inputs_of(name, "right", device).items()}
            model.zero_grad()
            result(model, inputs).square().mean().backward()
            return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model = build(name, device=device)
    want = gradients(model)
    enable_flash_attention(model)
    got = gradients(model)
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert_close(got[key], value, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["gemma2", "bert"])
def test_dropout_in_training_is_the_models_own(name, device):
    model = build(name, device=device)
    model.config.attention_dropout = model.config.attention_probs_dropout_prob = 0.5
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    reference = "eager" if name == "gemma2" else "sdpa"
    model.set_attn_implementation(reference)
    torch.manual_seed(3)
    want = result(model, inputs_of(name, "none", device))
    enable_flash_attention(model)
    torch.manual_seed(3)
    ours, _ = counted(lambda: None)
    got = result(model, inputs_of(name, "none", device))
    assert ours == 0
    assert_close(got, want)
    assert not torch.allclose(result(model, inputs_of(name, "none", device)), want)


def test_frozen_models_need_no_no_grad(device):
    with torch.inference_mode(False), torch.enable_grad():
        model = enable_flash_attention(build("llama", device=device)).requires_grad_(False)
        inputs = inputs_of("llama", "left", device)
        ours, theirs = counted(lambda: model(**inputs))
        assert ours
        assert theirs == []
        model.model.layers[1].self_attn.q_proj.requires_grad_(True)
        assert model(**inputs).logits.requires_grad


@pytest.mark.parametrize("name", ["llama", "bert", "bart"])
def test_attention_weights_are_given_where_asked_for(name, device):
    model, inputs = build(name, device=device), inputs_of(name, "right", device)
    want = model(**inputs, output_attentions=True)
    enable_flash_attention(model)
    got = model(**inputs, output_attentions=True)
    names = [key for key in want if "attentions" in key]
    assert all(weights is not None for weights in want[names[0]])
    for key in names:
        assert len(want[key]) == len(got[key])
        for a, b in zip(got[key], want[key], strict=True):
            assert_close(a, b)
    assert "attentions" not in model(**inputs)


def test_a_users_own_masks(device):
    """Boolean and additive matrices [batch, 1, seqlen_q, seqlen_k]."""
    model = build("llama", device=device)
    ids = inputs_of("llama", "none", device)["input_ids"]
    seen = torch.ones(SEQLEN, SEQLEN, device=device).tril().bool()
    seen[6:, :6] = False  # two documents
    seen = seen.expand(ids.shape[0], 1, -1, -1)
    added = torch.zeros(seen.shape, device=device).masked_fill(~seen, -1e9)
    want = model(ids, attention_mask=added).logits
    enable_flash_attention(model)
    assert_close(model(ids, attention_mask=added).logits, want)
    assert_close(model(ids, attention_mask=seen).logits, want)


def test_packed_sequences(device):
    """Positions that start again are sequences of their own, without a mask."""
    model = build("llama", device=device)
    ids = inputs_of("llama", "none", device)["input_ids"]
    positions = torch.cat([torch.arange(5), torch.arange(SEQLEN - 5)])[None].to(device)
    options = {"position_ids": positions.expand(ids.shape[0], -1), "use_cache": False}
    want = model(ids, **options).logits
    enable_flash_attention(model)
    assert_close(model(ids, **options).logits, want)


def test_masks_are_moved_and_copied(device):
    """As hooks of accelerate do it for layers on other devices."""
    model, inputs = build("llama", device=device), inputs_of("llama", "left", device)
    want = result(model, inputs)
    enable_flash_attention(model)
    seen = []

    def move(_, args, kwargs):
        mask = kwargs["attention_mask"]
        moved = torch.ops.aten._to_copy(mask, device=device)
        seen.append((type(mask), type(moved)))
        return args, kwargs | {"attention_mask": moved}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(move, with_kwargs=True)
    assert_close(result(model, inputs), want)
    assert seen == [(KeyMask, KeyMask)] * 2


def test_composite_models_and_their_copies(device):
    """A vision tower and a language model with configs of their own; undone, all is as before."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**CASES["vit"].options, projection_dim=32),
        text_config=transformers.LlamaConfig(**CASES["llama"].options),
        image_token_index=VOCAB - 1,
    )
    with torch.inference_mode(False):
        model = transformers.LlavaForConditionalGeneration(config).eval().to(device)
    before = {key: value._attn_implementation for key, value in configs(model).items()}
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 16, 16, generator=generator).to(device)
    ids = torch.cat([torch.full((1, 16), VOCAB - 1), torch.arange(3, 9)[None]], 1).to(device)
    want = model(input_ids=ids, pixel_values=pixels).logits
    enable_flash_attention(model)
    assert {c._attn_implementation for c in configs(model).values()} == {NAME}
    ours, theirs = counted(lambda: model(input_ids=ids, pixel_values=pixels))
    assert ours == 4
    assert theirs == []
    assert_close(model(input_ids=ids, pixel_values=pixels).logits, want)
    with torch.inference_mode(False):
        twin = copy.deepcopy(model)
    disable_flash_attention(model)
    assert {key: value._attn_implementation for key, value in configs(model).items()} == before
    assert {c._attn_implementation for c in configs(twin).values()} == {NAME}
    assert_close(twin(input_ids=ids, pixel_values=pixels).logits, want)


def configs(model):
    return {
        "": model.config,
        "vision": model.config.vision_config,
        "text": model.config.text_config,
    }


def test_old_classes_are_refused_by_name():
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=1, n_head=4)
    with torch.inference_mode(False):
        model = transformers.BloomForCausalLM(config)
    with pytest.raises(ValueError, match=r"got BloomForCausalLM; looked for .* code of its own"):
        enable_flash_attention(model)
