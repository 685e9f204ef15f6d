"""What was changed in a model's modules, before patch or after it, is never left out silently."""

from __future__ import annotations

import copy

import pytest
import torch
from families import LAYERS, VOCAB, PackedRun, tiny_model
from torch import nn
from torch.testing import assert_close

from llamatelemetry.inference.flash_attn import (
    FlashAttentionConfig,
    disable_flash_attention,
    enable_flash_attention,
)
from llamatelemetry.models.opset import REFERENCE
from llamatelemetry.models.patching import forward_tokens, patch, unpatch

pytestmark = pytest.mark.filterwarnings("ignore:patch. :UserWarning")


def tripled(module, args, output):
    return output * 3


def doubled(module, args):
    return (args[0] * 2, *args[1:])


def tripled_forward(linear):
    original = linear.forward
    linear.forward = lambda x: original(x) * 3


def zero_forward(mlp):
    mlp.forward = lambda x: x * 0


def hooked(module):
    module.register_forward_hook(tripled)


def pre_hooked(module):
    module.register_forward_pre_hook(doubled)


def ids_of(device):
    return torch.randint(VOCAB, (1, 7), device=device)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("mlp", zero_forward),
        ("mlp.gate_proj", hooked),
        ("mlp.down_proj", pre_hooked),
        ("self_attn.q_proj", hooked),
        ("self_attn.q_proj", tripled_forward),
    ],
)
def test_one_layer_changed_before(part, change, device):
    model, ids = tiny_model("llama", device), ids_of(device)
    change(model.model.layers[1].get_submodule(part))
    before = model(ids).logits
    report = patch(model)
    assert f"model.layers.1.{part.split('.')[0]}" in report.refused
    assert not [name for name in report.refused if not name.startswith("model.layers.1")]
    assert_close(model(ids).logits, before)


def test_a_hook_that_only_looks(device):
    model, ids, seen = tiny_model("llama", device), ids_of(device), []
    linear = model.model.layers[1].self_attn.q_proj
    linear.register_forward_hook(lambda *_: seen.append(1))
    report = patch(model)
    assert "q_proj carries forward hooks" in report.refused["model.layers.1.self_attn"]
    seen.clear()
    model(ids)
    assert seen == [1]


@pytest.mark.parametrize("part", ["self_attn", "self_attn.o_proj"])
def test_what_a_hook_keeps_or_puts_there_is_not_written(part, device):
    model, ids, kept = tiny_model("llama", device), ids_of(device), []
    part = model.model.layers[1].get_submodule(part)

    def first(output):
        return output if isinstance(output, torch.Tensor) else output[0]

    def results():
        kept.clear()
        handle = part.register_forward_hook(lambda *call: kept.append(first(call[-1])))
        model(ids)
        handle.remove()
        mine = torch.ones_like(kept[0])
        handle = part.register_forward_hook(
            lambda *call: mine if call[-1] is first(call[-1]) else (mine, *call[-1][1:])
        )
        logits = [model(ids).logits for _ in range(2)]
        handle.remove()
        assert torch.equal(mine, torch.ones_like(mine))
        return kept[0], *logits

    with torch.no_grad():
        before = results()
        patch(model)
        for ours, theirs in zip(results(), before, strict=True):
            assert_close(ours, theirs)


@pytest.mark.parametrize(
    "path", ["", "model", "model.layers.1", "model.layers.1.mlp", "model.norm"]
)
def test_hooks_that_the_engine_would_not_run(path, device):
    model, ids = tiny_model("llama", device), ids_of(device)
    handle = model.get_submodule(path).register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="the engine cannot run this model"):
        report = patch(model)
    assert report.refused == {}
    assert "carries forward hooks" in report.not_packed
    with pytest.raises(ValueError, match=r"patched as a whole, got .* carries forward hooks"):
        forward_tokens(model, ids[0], None, None)
    unpatch(model)
    handle.remove()
    assert patch(model).not_packed is None
    model.get_submodule(path).register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"carries forward hooks.* remove them, or begin again"):
        PackedRun(model, 1).step([ids[0]])


def test_hooks_of_transformers_and_of_modules_that_are_called(device):
    model, ids = tiny_model("llama", device), ids_of(device)
    model.lm_head.register_forward_hook(tripled)
    want = model(ids, output_hidden_states=True).logits  # leaves hooks on each layer
    assert patch(model).not_packed is None
    assert_close(PackedRun(model, 1).step([ids[0]]), want[:, -1])


def new_weight(layer):
    weight = layer.self_attn.q_proj.weight
    layer.self_attn.q_proj.weight = nn.Parameter(2 * weight.detach().clone())


def new_linear(layer):
    old = layer.mlp.gate_proj
    layer.mlp.gate_proj = nn.Linear(
        old.in_features, old.out_features, bias=False, device=old.weight.device
    )


def new_norm_weight(layer):
    norm = layer.post_attention_layernorm
    norm.weight = nn.Parameter(3 * norm.weight.detach().clone())


@pytest.mark.parametrize(
    ("change", "is_hooked"),
    [
        (new_weight, False),
        (new_linear, False),
        (new_norm_weight, False),
        (lambda layer: hooked(layer.mlp.gate_proj), True),
        (lambda layer: hooked(layer.self_attn.o_proj), True),
        (lambda layer: hooked(layer.post_attention_layernorm), True),
    ],
)
def test_one_layer_changed_after(change, is_hooked, device):
    model, ids = tiny_model("llama", device), ids_of(device)
    patch(model, strict=True)
    before = model(ids).logits
    with torch.inference_mode(False):
        change(model.model.layers[1])
    got = model(ids).logits
    if is_hooked:
        with pytest.raises(RuntimeError, match=r"forward_tokens: model\.layers\.1.*remove them"):
            PackedRun(model, 1).step([ids[0]])
    else:
        assert_close(PackedRun(model, 1).step([ids[0]]), got[:, -1])
    unpatch(model)
    want = model(ids).logits
    assert_close(got, want)
    assert not torch.allclose(got, before)
    patch(model)
    assert_close(model(ids).logits, want)


def test_another_head_after(device):
    model, ids = tiny_model("llama", device), ids_of(device)
    patch(model)
    with torch.inference_mode(False):
        head = nn.Linear(model.config.hidden_size, VOCAB, bias=False, device=device)
        model.set_output_embeddings(head)
    assert_close(PackedRun(model, 1).step([ids[0]]), model(ids).logits[:, -1])


def test_another_layer_after(device):
    model, ids = tiny_model("llama", device), ids_of(device)
    patch(model)
    model.model.layers[0] = tiny_model("llama", device).model.layers[0]
    assert_close(PackedRun(model, 1).step([ids[0]]), model(ids).logits[:, -1])
    model.model.norm = copy.deepcopy(model.model.layers[0].input_layernorm)
    assert_close(PackedRun(model, 1).step([ids[0]]), model(ids).logits[:, -1])


def test_a_second_patch_that_asks_for_more(device):
    model = tiny_model("llama", device)
    hooked(model.model.layers[1].mlp.up_proj)
    report = patch(model)
    assert patch(model) is report
    with pytest.raises(ValueError, match=r"must agree with its module, got .*layers\.1\.mlp"):
        patch(model, strict=True)
    with pytest.raises(ValueError, match=r"ops must be .* call unpatch\(model\) first"):
        patch(model, ops=REFERENCE)
    assert patch(copy.deepcopy(model)).refused == report.refused


@pytest.mark.parametrize("ops", [{}, {"ops": REFERENCE}])
@pytest.mark.parametrize("order", ["epdu", "epud", "peud", "pedu"])
def test_the_attention_that_was_chosen_comes_back(order, ops, device):
    model = tiny_model("llama", device)
    steps = {
        "e": enable_flash_attention,
        "d": disable_flash_attention,
        "p": lambda model: patch(model, **ops),
        "u": unpatch,
    }
    before = model.config._attn_implementation
    for i, step in enumerate(order):
        steps[step](model)
        enabled = "e" in order[: i + 1] and "d" not in order[: i + 1]
        patched = not ops and "p" in order[: i + 1] and "u" not in order[: i + 1]
        now = model.config._attn_implementation
        assert now == ("llamatelemetry" if enabled or patched else before)
    assert not [name for name in vars(model) if name.startswith("_llamatelemetry")]


CONFIG = FlashAttentionConfig(window_size=0, softmax_scale=3.0)


def test_a_configuration_before_patch(device):
    model, ids = tiny_model("llama", device), ids_of(device)
    enable_flash_attention(model, CONFIG)
    before = model(ids).logits
    report = patch(model)
    for i in range(LAYERS):
        for name in (f"model.layers.{i}.self_attn", f"model.layers.{i}"):
            assert "FlashAttentionConfig's softmax_scale=3.0" in report.refused[name]
    assert_close(model(ids).logits, before)
    with pytest.raises(ValueError, match="FlashAttentionConfig"):
        forward_tokens(model, ids[0], None, None)


def test_a_configuration_after_patch(device):
    model, ids = tiny_model("llama", device), ids_of(device)
    enable_flash_attention(model, CONFIG)
    want = model(ids).logits
    disable_flash_attention(model)
    patch(model)
    enable_flash_attention(model, CONFIG)
    assert_close(model(ids).logits, want)
    with pytest.raises(RuntimeError, match=r"FlashAttentionConfig.s softmax_scale=3\.0, win"):
        PackedRun(model, 1).step([ids[0]])
    disable_flash_attention(model)
    assert_close(PackedRun(model, 1).step([ids[0]]), model(ids).logits[:, -1])
