"""Our attention inside torch.compile(fullgraph=True): masks are right and kernels ours."""

from __future__ import annotations

import pytest
import torch
import transformers
from hf_models import build, inputs_of, result
from torch.testing import assert_close

from llamatelemetry.inference.flash_attn import FlashAttentionConfig, enable_flash_attention


@pytest.mark.parametrize(
    ("name", "side", "is_ours"),
    [
        ("llama", "none", True),
        ("llama", "left", True),
        ("llama", "right", True),
        ("bert", "right", True),
        ("gpt_oss", "left", True),
        ("gemma2", "left", False),
        ("mistral", "right", False),
    ],
)
def test_compiled_whole(name, side, is_ours, device):
    """Windows over padding that only the device knows are torch's or eager attention's."""
    model = build(name, device=device)
    inputs = inputs_of(name, side, device) | ({} if name == "bert" else {"use_cache": False})
    want = result(model, inputs)
    enable_flash_attention(model)
    compiled, graphs = compiled_whole(model)
    assert_close(result_of(compiled, inputs), want)
    assert ("llamatelemetry.paged_attention" in graphs[0]) or not is_ours


def compiled_whole(model):
    """The compiled model, and a list that gets the text of each graph made of it."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=backend), graphs


def result_of(compiled, inputs):
    out = compiled(**inputs)[0]
    return out[inputs["attention_mask"].bool()]


def test_compiled_decode_with_a_static_cache_is_ours(device):
    eager, model = build("mistral", device=device), build("mistral", device=device)
    enable_flash_attention(model)
    compiled, graphs = compiled_whole(model)

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


def test_compiled_with_a_window_of_the_configuration(device):
    """Prefill and a decode step; padding and all."""
    model, config = build("llama", device=device), FlashAttentionConfig(window_size=3)
    inputs = inputs_of("llama", "left", device)
    enable_flash_attention(model, config)

    def logits(call):
        past = transformers.DynamicCache(config=model.config)
        first = call(**inputs, past_key_values=past).logits[inputs["attention_mask"].bool()]
        mask = inputs["attention_mask"]
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
        ids = inputs["input_ids"][:, :1]
        return first, call(ids, attention_mask=mask, past_key_values=past).logits

    torch._dynamo.reset()
    assert_close(logits(torch.compile(model, fullgraph=True, backend="eager")), logits(model))
