"""What has a row's base model inside is patched; what has none is tried, and held to the whole."""

from __future__ import annotations

import warnings

import pytest
import reach
import torch
import transformers
from families import VOCAB, PackedRun, tiny_model
from hf_models import TINY_SIZES
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from llamatelemetry.inference.decode_step import has_experts
from llamatelemetry.models.patching import forward_tokens, patch, unpatch

SIZES = {
    "vocab_size": VOCAB,
    **TINY_SIZES,
    "pad_token_id": 0,
}
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def made(kind, config, device):
    with torch.inference_mode(False), torch.no_grad():
        model = kind(config).eval()
        for parameter in model.parameters():
            parameter.normal_(float(parameter.ndim == 1), 0.15)
        return model.to(device)


def ids_of(device):
    return torch.randint(1, VOCAB, (2, 9), device=device)


def packed_steps(model, ids):
    run = PackedRun(model, len(ids))
    return [run.step(list(ids[:, begin:end])) for begin, end in ((0, 5), (5, 6), (6, 9))]


@pytest.mark.parametrize(
    "name",
    [
        "LlamaModel",
        "LlamaForSequenceClassification",
        "LlamaForTokenClassification",
        "LlamaForQuestionAnswering",
        "Gemma2ForSequenceClassification",
        "GPT2ForSequenceClassification",
        "OPTModel",
    ],
)
def test_base_models_and_heads(name, device):
    kind = getattr(transformers, name)
    more = {"ffn_dim": 96, "word_embed_proj_dim": 64} if name == "OPTModel" else {}
    config = kind.config_class(**SIZES | more)
    config._attn_implementation = "eager"
    model, ids = made(kind, config, device), ids_of(device)
    before = model(ids)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = patch(model)
    assert report.refused == {}
    assert report.replaced["Attention"] == 2
    assert "is not decoder layers and a vocabulary projection" in report.not_packed
    assert_close(model(ids)[0], before, **CLOSE)
    with pytest.raises(ValueError, match="patched as a whole"):
        forward_tokens(model, ids[0], None, None)
    unpatch(model)
    assert torch.equal(model(ids)[0], before)


class Plain(LlamaForCausalLM):
    """A user's class that changes nothing."""


class Louder(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 3
        return out


class LouderModel(LlamaModel):
    def forward(self, input_ids, **kwargs):
        kwargs["inputs_embeds"] = 3 * self.embed_tokens(input_ids)
        return super().forward(**kwargs)


class LouderInside(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = LouderModel(config)


def test_a_subclass_is_its_base_class(device):
    model, ids = made(Plain, LlamaConfig(**SIZES), device), ids_of(device)
    before = model(ids).logits
    assert patch(model).not_packed is None
    assert_close(model(ids).logits, before, **CLOSE)
    for ours, end in zip(packed_steps(model, ids), (5, 6, 9), strict=True):
        assert_close(ours, before[:, end - 1], **CLOSE)


@pytest.mark.parametrize("kind", [Louder, LouderInside])
def test_what_a_subclass_adds_keeps_it_from_the_engine(kind, device):
    model, ids = made(kind, LlamaConfig(**SIZES), device), ids_of(device)
    before = model(ids).logits
    report = patch(model)
    assert report.refused == {}
    assert "as a whole it errs by" in report.not_packed
    assert_close(model(ids).logits, before, **CLOSE)


def test_an_adapter_around_a_model(device):
    peft = pytest.importorskip("peft")
    with torch.inference_mode(False):
        inner = made(LlamaForCausalLM, LlamaConfig(**SIZES), device)
        adapted = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
        model = peft.get_peft_model(inner, adapted).eval()
    ids = ids_of(device)
    before = model(input_ids=ids).logits
    report = patch(model)
    assert report.replaced["DecoderLayer"] == 2
    assert_close(model(input_ids=ids).logits, before, **CLOSE)


@pytest.mark.parametrize(
    "name", ["Ernie4_5_MoeForCausalLM", "Dots1ForCausalLM", "FlexOlmoForCausalLM"]
)
def test_a_class_without_a_row_is_tried_by_its_modules(name, device):
    with torch.inference_mode(False), torch.no_grad():
        (model_type,) = [kind for kind, known in reach.causal_classes() if known == name]
        model = reach.tiny(model_type, name).to(device)
    ids = ids_of(device)
    before = model(ids).logits
    report = patch(model, strict=True)
    assert report.not_packed is None
    assert_close(model(ids).logits, before, **CLOSE)
    for ours, end in zip(packed_steps(model, ids), (5, 6, 9), strict=True):
        assert_close(ours, before[:, end - 1], **CLOSE)


class Halved(transformers.PreTrainedModel):
    """A class of nobody's, which does something between the layers."""

    config_class = LlamaConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([LlamaDecoderLayer(config, i) for i in range(2)])
        self.norm = type(self.layers[0].input_layernorm)(config.hidden_size)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids, **kwargs):
        x = self.embed_tokens(input_ids)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        for layer in self.layers:
            x = 0.5 * layer(x, position_embeddings=self.rotary_emb(x, positions))
        x = self.norm(x)
        return transformers.modeling_outputs.CausalLMOutputWithPast(
            logits=self.lm_head(x), hidden_states=x
        )


def test_a_class_of_nobodys(device):
    model, ids = made(Halved, LlamaConfig(**SIZES), device), ids_of(device)
    before = model(ids).logits
    report = patch(model)
    assert report.replaced["DecoderLayer"] == 2
    assert_close(model(ids).logits, before, **CLOSE)
    assert report.not_packed is not None


class FickleModel(LlamaModel):
    """Sees which layers it has."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        if "forward" in vars(self.layers[0]):
            out.last_hidden_state = out.last_hidden_state + 1
        return out


def test_what_differs_as_a_whole_is_taken_out_again(device):
    model, ids = made(FickleModel, LlamaConfig(**SIZES), device), ids_of(device)
    before = model(ids)[0]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.warns(UserWarning, match="as a whole it errs by"):
        report = patch(model)
    assert not report.replaced
    assert torch.equal(model(ids)[0], before)
    unpatch(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    with pytest.raises(ValueError, match="as a whole it errs by"):
        patch(model, strict=True)


@pytest.mark.parametrize(
    ("family", "routes"),
    [("mixtral", True), ("gpt_oss", True), ("granitemoe", True), ("opt", False)],
)
def test_experts_are_not_captured_in_graphs(family, routes, device):
    assert has_experts(tiny_model(family, device)) == routes


@pytest.mark.parametrize("family", ["gpt2", "phi", "starcoder2"])
def test_dropout_is_the_modules_own(family, device):
    model = tiny_model(family, device)
    ids = ids_of(device)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.3
        if hasattr(part, "residual_dropout"):
            part.residual_dropout = 0.3
    model.train()
    patch(model)
    torch.manual_seed(1)
    ours = model(ids).logits
    unpatch(model)
    torch.manual_seed(1)
    assert_close(ours, model(ids).logits, **CLOSE)
