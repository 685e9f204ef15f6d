"""enable_flash_attention on any module: what torch's attention gives, by our kernels; undone."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from families import OpCounter
from torch import nn
from torch.testing import assert_close

from llamatelemetry.inference.flash_attn import (
    FlashAttentionConfig,
    disable_flash_attention,
    enable_flash_attention,
)

OURS = ("llamatelemetry::flash_attn", "llamatelemetry::paged_attention")


@pytest.fixture(autouse=True)
def _one_thread(set_threads):
    set_threads(1)


def counted(call):
    with OpCounter() as counter:
        call()
    theirs = [name for name in counter.calls if "scaled_dot_product" in name]
    return sum(counter.calls[name] for name in OURS), theirs


def attend(q, k, v, mask=None, causal=False):
    """A helper that modules call, as many repositories have one."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class Plain(nn.Module):
    """Attention of a module's own, by way of a helper."""

    def __init__(self, width=32, heads=2):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x, mask=None, causal=True):
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        return self.out(attend(q, k, v, mask, causal).transpose(1, 2).flatten(2))


def made(kind, *args, device="cpu", **kwargs):
    with torch.inference_mode(False):
        torch.manual_seed(0)
        return kind(*args, **kwargs).eval().to(device)


def x_of(device="cpu", seqlen=6):
    with torch.inference_mode(False):
        return torch.randn(2, seqlen, 32, generator=torch.Generator().manual_seed(1)).to(device)


def padding(device="cpu"):
    hidden = torch.zeros(2, 6, dtype=torch.bool, device=device)
    hidden[0, -2:] = True
    return hidden


def test_plain_module(device):
    model, x = made(Plain, device=device), x_of(device)
    seen = ~padding(device)[:, None, None]
    calls = [(x,), (x, None, False), (x, seen, False), (x[:, :1], None, False)]
    want = [model(*call) for call in calls]
    assert enable_flash_attention(model) is model
    assert isinstance(model, Plain)
    for call, value in zip(calls, want, strict=True):
        ours, theirs = counted(lambda call=call: model(*call))
        assert (ours, theirs) == (1, [])
        assert_close(model(*call), value)
    dense = torch.rand(2, 1, 6, 6, device=device) > 0.3
    dense = dense | torch.eye(6, device=device, dtype=torch.bool)
    got = model(x, dense, False)
    disable_flash_attention(model)
    assert type(model) is Plain
    assert_close(got, model(x, dense, False))
    assert counted(lambda: model(x))[0] == 0


def test_plain_module_copied_saved_and_compiled(device):
    model, x = made(lambda: nn.Sequential(Plain(), Plain()), device=device), x_of(device)
    want = model(x)
    enable_flash_attention(enable_flash_attention(model))
    with torch.inference_mode(False):
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    for each in (twin, loaded):
        assert counted(lambda each=each: each(x))[0] == 2
        assert_close(each(x), want)
        disable_flash_attention(each)
        assert type(each[0]) is Plain
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), want)
    with torch.inference_mode(False), torch.no_grad():
        twin[0].out.weight.zero_()
    assert_close(model(x), want)


def test_plain_module_with_gradients(device):
    model, x = made(Plain, device=device), x_of(device)

    def gradient():
        with torch.inference_mode(False), torch.enable_grad():
            model.zero_grad()
            model(x.clone()).square().sum().backward()
            return model.qkv.weight.grad.clone()

    want = gradient()
    enable_flash_attention(model)
    assert_close(gradient(), want)
    model.requires_grad_(False)
    with torch.inference_mode(False), torch.enable_grad():
        assert counted(lambda: model(x.clone()))[0] == 1


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kdim", [None, 24])
def test_multihead_attention(batch_first, kdim, device):
    options = {"batch_first": batch_first, "kdim": kdim, "vdim": kdim}
    model = made(nn.MultiheadAttention, 32, 2, device=device, **options)
    x = x_of(device)
    memory = x if kdim is None else x[..., :kdim]
    inputs = [x, memory, memory]
    inputs = inputs if batch_first else [y.transpose(0, 1) for y in inputs]
    above = torch.ones(6, 6, dtype=torch.bool, device=device).triu(1)
    calls = [
        {},
        {"key_padding_mask": padding(device)},
        {"attn_mask": above, "is_causal": True},
        {"attn_mask": above},
        {"attn_mask": above, "key_padding_mask": padding(device)},
        {"attn_mask": torch.randn(4, 6, 6, device=device)},
        {"attn_mask": above.float() * -9.0, "key_padding_mask": padding(device)},
    ]
    want = [model(*inputs, need_weights=False, **call)[0] for call in calls]
    weights = model(*inputs)[1]
    enable_flash_attention(model)
    for call, value in zip(calls, want, strict=True):
        out, none = model(*inputs, need_weights=False, **call)
        assert none is None
        assert_close(out, value)
    assert_close(model(*inputs)[1], weights)
    assert [counted(lambda c=c: model(*inputs, need_weights=False, **c))[0] for c in calls[:3]] == [
        1,
        1,
        1,
    ]


def test_transformer_encoder(device):
    """In inference torch's own fused layers would pass MultiheadAttention by."""
    layer = made(nn.TransformerEncoderLayer, 32, 2, 64, batch_first=True, device=device)
    model = made(nn.TransformerEncoder, layer, 2, device=device)
    x, hidden = x_of(device), padding(device)
    want = [model(x), model(x, src_key_padding_mask=hidden)]
    enable_flash_attention(model)
    got = [model(x), model(x, src_key_padding_mask=hidden)]
    assert_close(got[0], want[0])
    assert_close(got[1][~hidden], want[1][~hidden])
    assert counted(lambda: model(x, src_key_padding_mask=hidden)) == (2, [])


def test_no_attention_is_refused():
    with pytest.raises(
        ValueError,
        match=r"model must contain attention .* got Linear; looked for .* AttentionInterface, "
        r"nn.MultiheadAttention .* scaled_dot_product_attention",
    ):
        enable_flash_attention(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"version": 1}, "version must be 2 or 3, got 1"),
        ({"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\), got 1.5"),
        ({"softmax_scale": float("nan")}, "softmax_scale must be finite, got nan"),
        ({"dropout_p": "x"}, "dropout_p must be a number, got 'x'"),
        ({"softmax_scale": [1]}, r"softmax_scale must be a number, got \[1\]"),
        ({"window_size": (1,)}, "window_size must be None"),
        ({"window_size": 1.5}, "window_size must be None, .*got 1.5"),
    ],
)
def test_config_refusals(config, message):
    with pytest.raises(ValueError, match=f"enable_flash_attention: {message}"):
        enable_flash_attention(made(Plain), FlashAttentionConfig(**config))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_hoppers_kernels_need_hopper():
    with pytest.raises(ValueError, match=r"version must be 2 on this machine, got 3; .* no GPU"):
        enable_flash_attention(made(Plain), FlashAttentionConfig(version=3))


def test_config_acts_on_plain_modules(device):
    model, x = made(Plain, device=device), x_of(device)
    plain = model(x)
    enable_flash_attention(model, FlashAttentionConfig(causal=False))
    assert_close(model(x), disable_flash_attention(model)(x, None, False))
    window = torch.ones(6, 6, device=device).tril().triu(-1).bool()
    want = model(x, window, False)
    enable_flash_attention(model, FlashAttentionConfig(window_size=1))
    assert_close(model(x), want)
    enable_flash_attention(model, FlashAttentionConfig(softmax_scale=1.0))
    scaled = model(x)
    disable_flash_attention(model)
    with torch.inference_mode(False), torch.no_grad():
        model.qkv.weight[:32] *= 4
        model.qkv.bias[:32] *= 4
    assert_close(scaled, model(x))
    assert not torch.allclose(scaled, plain)


def test_config_enabled_and_dropout(device):
    model, x = made(Plain, device=device), x_of(device)
    want = model(x)
    enable_flash_attention(model, FlashAttentionConfig(dropout_p=0.5))
    assert_close(model(x), want)
    model.train()
    assert not torch.allclose(model(x), model(x))
    enable_flash_attention(model, FlashAttentionConfig(enabled=False))
    assert type(model) is Plain
    assert_close(model(x), want)


def test_config_acts_on_transformers_models(device):
    from hf_models import build, inputs_of

    model, inputs = build("llama", device=device), inputs_of("llama", "left", device)
    tokens = inputs["attention_mask"].bool()
    windowed, scaled = build("llama", device=device), build("llama", device=device)
    both = tokens[:, None, None]
    at = torch.arange(tokens.shape[1], device=device)
    near = (at[:, None] - at).tril() <= 2
    seen = (near.tril() & both).expand(-1, 1, -1, -1)
    added = torch.zeros(seen.shape, device=device).masked_fill(~seen, -1e9)
    positions = {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    want = windowed(inputs["input_ids"], attention_mask=added, **positions).logits[tokens]
    enable_flash_attention(model, FlashAttentionConfig(window_size=2))
    assert_close(model(**inputs, **positions).logits[tokens], want)
    for layer in scaled.model.layers:
        layer.self_attn.scaling = 0.5
    enable_flash_attention(model, FlashAttentionConfig(softmax_scale=0.5))
    want = scaled(**inputs).logits[tokens]
    assert_close(model(**inputs).logits[tokens], want)
    seen = both.expand(-1, 1, tokens.shape[1], -1)
    added = torch.zeros(seen.shape, device=device).masked_fill(~seen, -1e9)
    want = windowed(inputs["input_ids"], attention_mask=added, **positions).logits[tokens]
    enable_flash_attention(model, FlashAttentionConfig(causal=False))
    assert_close(model(**inputs, **positions).logits[tokens], want)
    disable_flash_attention(model)
    assert "is_causal" not in model.config.to_dict()
    assert model.config._attn_implementation == "eager"


def test_multihead_weights_under_a_configuration(device):
    """Torch computes the weights, so that a configuration would be ignored."""
    model, x = made(nn.MultiheadAttention, 32, 2, batch_first=True, device=device), x_of(device)
    want = model(x, x, x)
    enable_flash_attention(model)
    assert_close(model(x, x, x), want)
    enable_flash_attention(model, FlashAttentionConfig(softmax_scale=3.0))
    with pytest.raises(ValueError, match=r"need_weights must be False.*softmax_scale=3\.0"):
        model(x, x, x)
    assert not torch.allclose(model(x, x, x, need_weights=False)[0], want[0])
    enable_flash_attention(model, FlashAttentionConfig(dropout_p=0.5))
    assert_close(model(x, x, x), want)
