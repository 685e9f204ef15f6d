"""transformers' models give with our attention what they give with their own eager one."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from families import OpCounter
from hf_models import CASES, CAUSAL, SEQLEN, VOCAB, build, build_exact, inputs_of, result
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
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "minicpm3", "bert", "llama_head_dim_20"])
def test_outputs_in_half_precision(name, dtype, device):
    inputs = inputs_of(name, "left", device)
    model = build(name, dtype=dtype, device=device)
    exact, theirs = result(build_exact(name, model, device), inputs), result(model, inputs)
    enable_flash_attention(model)
    assert_within_2x(result(model, inputs), theirs, exact)


# Position biases are added to scores, and torch's attention serves wider heads.
_NOT_OURS = {"t5", "llama_head_dim_264", "doge", "llama4_chunked"}


@pytest.mark.parametrize(
    ("name", "side"), [case for case in cases_and_sides() if case[0] not in _NOT_OURS]
)
def test_attention_is_ours(name, side, device):
    """With padding too: nothing falls back to torch's attention, which would be right as well."""
    model = enable_flash_attention(build(name, device=device))
    ours, theirs = counted(lambda: result(model, inputs_of(name, side, device)))
    assert ours
    assert theirs == []


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "llama", "bert", "minicpm3", "mistral"])
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


def greedy(model, side, **options):
    inputs = inputs_of("llama", side, model.device)
    return model.generate(
        **inputs, max_new_tokens=6, do_sample=False, pad_token_id=0, disable_compile=True, **options
    )[:, SEQLEN:].tolist()


# transformers' own masks of chunks do not take a static cache.
@pytest.mark.parametrize(
    ("name", "cache"),
    [
        (name, cache)
        for name in CAUSAL
        for cache in ("dynamic", "static")
        if (name, cache) != ("llama4_chunked", "static")
    ],
)
def test_greedy_tokens(name, cache, device):
    model = build(name, device=device)
    options = {"cache_implementation": cache}
    want = [greedy(model, side, **options) for side in ("none", "left", "right")]
    enable_flash_attention(model)
    assert [greedy(model, side, **options) for side in ("none", "left", "right")] == want


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "gpt_oss"])
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 5}],
    ids=["beams", "prompt_lookup", "chunked_prefill"],
)
def test_other_ways_to_generate(name, options, device):
    model = build(name, device=device)
    lookup = "prompt_lookup_num_tokens" in options

    def tokens():
        if not lookup:
            return greedy(model, "left", **options)
        ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]], device=device)
        return model.generate(ids, max_new_tokens=8, do_sample=False, **options).tolist()

    want = tokens()
    enable_flash_attention(model)
    assert tokens() == want


def test_assisted_generation(device):
    model, draft = build("llama", device=device), build("mistral", device=device)
    ids = inputs_of("llama", "none", device)["input_ids"][:1]
    want = model.generate(ids, max_new_tokens=8, do_sample=False)
    for each in (model, draft):
        enable_flash_attention(each)
    got = model.generate(ids, max_new_tokens=8, do_sample=False, assistant_model=draft)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["bart", "whisper", "t5"])
def test_encoder_decoders_generate(name, device):
    inputs = inputs_of(name, "right", device)
    decoder = inputs.pop("decoder_input_ids")[:, :1]
    model = build(name, device=device)

    def tokens():
        options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
        return model.generate(**inputs, decoder_input_ids=decoder, **options).tolist()

    want = tokens()
    enable_flash_attention(model)
    assert tokens() == want


@pytest.mark.parametrize(
    ("name", "is_ours"),
    [("llama", True), ("bert", True), ("gpt_oss", True), ("gemma2", False), ("mistral", False)],
)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_compiled_whole(name, is_ours, side, device):
    """Windows over padding that only the device knows are torch's or eager attention's."""
    model = build(name, device=device)
    inputs = inputs_of(name, side, device) | ({} if name == "bert" else {"use_cache": False})
    want = result(model, inputs)
    enable_flash_attention(model)
    graphs = []

    def backend(graph, _):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_close(result_of(compiled, inputs), want)
    assert ("llamatelemetry.paged_attention" in graphs[0]) or not is_ours


def result_of(compiled, inputs):
    out = compiled(**inputs)[0]
    return out[inputs["attention_mask"].bool()]


def test_compiled_decode_with_a_static_cache_is_ours(device):
    eager, model = build("mistral", device=device), build("mistral", device=device)
    enable_flash_attention(model)
    graphs = []

    def backend(graph, _):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)

    def steps(model, step):
        inputs = inputs_of("mistral", "left", device)
        seen, tokens, outputs = inputs["attention_mask"], inputs["input_ids"], []
        past = transformers.StaticCache(config=model.config, max_cache_len=20)
        for i in range(4):
            positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            call = model if i == 0 else step
            options = {"position_ids": positions, "past_key_values": past}
            outputs.append(call(tokens, attention_mask=seen, **options).logits[:, -1])
            seen = torch.cat([seen, seen.new_ones(seen.shape[0], 1)], 1)
            tokens = inputs["input_ids"][:, i : i + 1]
        return torch.stack(outputs)

    assert_close(steps(model, compiled), steps(eager, eager))
    assert all("scaled_dot_product" not in graph for graph in graphs)
    assert "llamatelemetry.paged_attention" in graphs[0]


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_layers_compiled_one_by_one(name, device):
    """The mask is made outside of the compiled graphs and goes into them."""
    model = build(name, device=device)
    inputs = [inputs_of(name, side, device) for side in ("left", "none", "right", "left")]
    want = [result(model, each) for each in inputs]
    enable_flash_attention(model)
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    for each, value in zip(inputs, want, strict=True):
        assert_close(result(model, each), value)


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


def test_more_than_one_chunk_and_a_gap(device):
    """A prompt padded on the right and then more tokens at once, in a window and without one."""
    for name in ("llama", "mistral"):
        model = build(name, device=device)
        inputs = inputs_of(name, "right", device)

        def logits(model=model, inputs=inputs):
            past = transformers.DynamicCache(config=model.config)
            model(**inputs, past_key_values=past)
            mask = inputs["attention_mask"]
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 3)], 1)
            ids = inputs["input_ids"][:, :3]
            return model(ids, attention_mask=mask, past_key_values=past).logits

        want = logits()
        enable_flash_attention(model)
        assert_close(logits(), want)


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
