"""The linears of a patched dense model: which calls are our op's, and its step as a recording."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import LAYERS, VOCAB, PackedRun, tiny_model
from gguf_rows import gguf_rows
from torch import nn
from torch.testing import assert_close

from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.models.opset import NATIVE
from llamatelemetry.models.patching import patch, unpatch
from llamatelemetry.models.pieces.linear import MOST_ROWS, Joined, is_dense
from llamatelemetry.ops import QuantFormat, repack, silu_and_mul
from llamatelemetry.quantization.modules import QuantLinear

PROMPTS = [[3, 1, 4, 1, 5], [9, 2]]
COUNT = 6


def counting(calls):
    def linear(x, weight, bias, residual, activation):
        calls.append((tuple(x.shape), weight.shape[0], activation))
        return NATIVE.linear(x, weight, bias, residual, activation)

    return replace(NATIVE, linear=linear)


@pytest.mark.parametrize("rows", [1, MOST_ROWS, MOST_ROWS + 1])
def test_few_rows_are_our_op_s(rows, device):
    model, calls = tiny_model("llama", device), []
    patch(model, ops=counting(calls))
    calls.clear()
    run = PackedRun(model, rows)
    run.step([torch.randint(VOCAB, (1,), device=device)] * rows)
    assert len(calls) == (4 * LAYERS + 1 if rows <= MOST_ROWS else 0)  # and the head
    gated = [n for _, n, activation in calls if activation == "silu_and_mul"]
    width = 2 * model.config.intermediate_size
    assert gated == [width] * (LAYERS if rows <= MOST_ROWS else 0)


def generate(model, prompts=PROMPTS):
    generator = TokenGenerator(model)
    tokens = list(generator.generate(prompts, [GREEDY] * len(prompts), COUNT))
    return tokens, generator.decode_mode


# Biases and norms of heads; a factor on the embeddings; an embedding of positions.
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma"])
def test_the_recorded_step_is_the_eager_one(family):
    model = tiny_model(family)
    patch(model, ops=replace(NATIVE, linear=None))
    eager, mode = generate(model)
    assert mode == "eager"
    unpatch(model)
    patch(model)
    recorded, mode = generate(model)
    assert mode == "recorded"
    assert recorded == eager


def test_a_recorded_step_looks_new_embeddings_up():
    model = tiny_model("llama")
    patch(model)
    generator = TokenGenerator(model)
    steps = generator.generate(PROMPTS[:1], [GREEDY], COUNT)
    tokens = [next(steps)[0] for _ in range(3)]
    assert generator.decode_mode == "recorded"
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(-1)
    (token,) = next(steps)
    # The keys of the tokens before stay as they were.
    run = PackedRun(model, 1)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(-1)
    run.step([torch.tensor(PROMPTS[0] + tokens[:-1])])
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(-1)
    assert token == int(run.step([torch.tensor(tokens[-1:])]).argmax())


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_other_linears_keep_their_forward(device):
    x = torch.randn(2, 8, device=device)
    own = nn.Linear(8, 4, device=device)
    own.forward = lambda x: x[:, :4]
    for linear in (Doubled(8, 4, device=device), own, nn.Linear(8, 4).double().to(device)):
        assert not is_dense(linear)
    for linear in (Doubled(8, 4, device=device), own):
        assert_close(Joined(linear, (), NATIVE)(x), linear(x))


def test_an_own_forward_of_packed_weights_is_called_as_it_is(device):
    """It need not take an activation; a QuantLinear's applies it, in sets of ops that say so."""
    rows = repack(gguf_rows(QuantFormat.Q8_0, 8, 32, device), "Q8_0")
    x = torch.randn(2, 32, device=device)
    for ops in (NATIVE, replace(NATIVE, activates_packed=False)):
        linear = QuantLinear(rows, QuantFormat.Q8_0, 8)
        gated = Joined(linear, (), ops, silu_and_mul, "silu_and_mul")(x)
        assert_close(gated, silu_and_mul(linear(x)))
        linear.forward = lambda x: x[:, :4]
        own = Joined(linear, (), ops, silu_and_mul, "silu_and_mul")(x)
        assert torch.equal(own, silu_and_mul(x[:, :4].contiguous()))


def test_columns_in_any_place_are_served(device):
    linear = nn.Linear(8, 4, device=device).requires_grad_(False)
    x = torch.randn(8, 2, 3, device=device).permute(1, 2, 0)
    assert_close(Joined(linear, (), NATIVE)(x), linear(x))


def test_hooks_on_the_head_are_called(device):
    model = tiny_model("llama", device)
    patch(model)
    seen = []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    PackedRun(model, 1).step([torch.randint(VOCAB, (1,), device=device)])
    assert seen == [1]
