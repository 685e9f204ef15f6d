"""enable_cuda_graphs: the same outputs as before, whatever changes between calls, and undo."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from families import VOCAB, tiny_model
from torch import nn

from llamatelemetry.cuda import disable_cuda_graphs, enable_cuda_graphs
from llamatelemetry.cuda.model_graphs import MAX_GRAPHS, modules_of, same_bits, signature
from llamatelemetry.inference import (
    FlashAttentionConfig,
    disable_flash_attention,
    enable_flash_attention,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*no CUDA device holds")


class Net(nn.Module):
    """Positional, keyword and constant inputs; nested outputs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("offset", torch.ones(8))

    def forward(self, x, scale=1.0, residual=None):
        y = self.linear(x) * scale + self.offset
        return {"y": y if residual is None else y + residual, "pair": (y, None, scale)}


def net(device):
    with torch.inference_mode(False):
        return Net().to(device).eval()


def graphs_of(model):
    return model.forward.num_graphs


def test_outputs_are_the_models_own(device):
    """It was a pass-through; now there is a graph for each signature."""
    model = net(device)
    plain = copy.deepcopy(model)
    assert enable_cuda_graphs(model) is model
    calls = [
        lambda m, n: m(torch.full((n, 8), 0.5, device=device)),
        lambda m, n: m(torch.ones(n, 8, device=device), scale=2.0),
        lambda m, n: m(x=torch.ones(n, 8, device=device), residual=torch.ones(8, device=device)),
    ]
    for _ in range(3):
        for n in (1, 3):
            for call in calls:
                torch.testing.assert_close(call(model, n), call(plain, n), rtol=0, atol=0)
    assert graphs_of(model) == (6 if device.type == "cuda" else 0)


def test_outputs_of_one_call_survive_the_next(device):
    model = enable_cuda_graphs(net(device))
    first = model(torch.zeros(2, 8, device=device))["y"]
    kept = first.clone()
    model(torch.ones(2, 8, device=device))
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.half().float(),
        lambda m: setattr(m.linear, "weight", nn.Parameter(torch.ones_like(m.linear.weight))),
        lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
        lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True),
        lambda m: m.linear.weight.zero_(),
        lambda m: setattr(m, "linear", nn.Linear(8, 8, device=m.offset.device)),
        lambda m: setattr(m, "offset", torch.zeros_like(m.offset)),
    ],
    ids=["to", "parameter", "load", "assign", "in_place", "module", "buffer"],
)
def test_weights_may_change_and_move(device, move):
    model, x = enable_cuda_graphs(net(device)), torch.randn(2, 8, device=device)
    model(x)
    with torch.inference_mode(False), torch.no_grad():
        move(model)
    plain = disable_cuda_graphs(copy.deepcopy(model))
    for _ in range(2):
        torch.testing.assert_close(model(x)["y"], plain(x)["y"], rtol=0, atol=0)


def test_undo_and_twice(device):
    model = net(device)
    assert "forward" not in model.__dict__
    once = enable_cuda_graphs(model).forward
    assert enable_cuda_graphs(model).forward is once
    disable_cuda_graphs(model)
    assert "forward" not in model.__dict__
    disable_cuda_graphs(model)
    own = model.forward = lambda x: x + 1
    enable_cuda_graphs(model)
    assert model(torch.zeros(1, device=device)).item() == 1
    disable_cuda_graphs(model)
    assert model.forward is own


def test_a_copy_runs_its_own_weights(device):
    model, x = enable_cuda_graphs(net(device)), torch.randn(2, 8, device=device)
    before = model(x)["y"]
    with torch.inference_mode(False), torch.no_grad():
        twin = copy.deepcopy(model)
        twin.linear.weight.zero_()
    assert torch.equal(twin(x)["y"], disable_cuda_graphs(copy.deepcopy(twin))(x)["y"])
    assert torch.equal(model(x)["y"], before)


def test_gradients_flow_as_before(device, caplog):
    model = enable_cuda_graphs(net(device))
    with torch.inference_mode(False), caplog.at_level(logging.WARNING, "llamatelemetry"):
        for _ in range(3):
            model(torch.ones(1, 8, device=device))["y"].sum().backward()
    assert model.linear.weight.grad is not None
    want = "gradients are enabled" if device.type == "cuda" else "its tensors are on cpu"
    assert [want in r.message for r in caplog.records] == [True]
    assert graphs_of(model) == 0


def test_on_the_cpu_it_warns_and_logs_one_reason(no_cuda, caplog):
    with pytest.warns(UserWarning, match="enable_cuda_graphs: no CUDA device"):
        model = enable_cuda_graphs(net(torch.device("cpu")))
    with caplog.at_level(logging.WARNING, "llamatelemetry"):
        for n in range(1, 4):
            model(torch.ones(n, 8))
    assert [r.message for r in caplog.records] == [
        "Net runs without CUDA graphs: its tensors are on cpu and not on one CUDA device"
    ]


def test_a_hugging_face_model(device):
    model = tiny_model("llama", device)
    ids = torch.randint(VOCAB, (2, 7), device=device)
    mask = torch.ones_like(ids)
    plain = model(ids, attention_mask=mask, use_cache=False).logits
    enable_cuda_graphs(model)
    for _ in range(2):
        out = model(ids, attention_mask=mask, use_cache=False)
        torch.testing.assert_close(out.logits, plain)
        assert type(out).__name__ == "CausalLMOutputWithPast"
    assert graphs_of(model) == (device.type == "cuda")


def test_generate_still_works(device):
    model = tiny_model("llama", device)
    ids = torch.randint(VOCAB, (1, 5), device=device)
    before = model.generate(ids, max_new_tokens=6, do_sample=False)
    after = enable_cuda_graphs(model).generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    "make", [lambda: tiny_model("llama", "cpu"), lambda: nn.MultiheadAttention(8, 2).eval()]
)
def test_another_attention_is_another_signature(make):
    """Graphs from before enable_flash_attention went on after it."""
    model = make()

    def key():
        return signature([], None, modules_of(model))

    keys = [key()]
    for config in (FlashAttentionConfig(), FlashAttentionConfig(window_size=1)):
        enable_flash_attention(model, config)
        keys.append(key())
    assert len(set(keys)) == 3
    assert key() == key()
    disable_flash_attention(model)
    assert key() == keys[0]


def test_another_implementation_is_another_signature():
    model = tiny_model("llama", "cpu")
    model.set_attn_implementation("eager")
    eager = signature([], None, modules_of(model))
    model.set_attn_implementation("sdpa")
    assert signature([], None, modules_of(model)) != eager


def test_flash_attention_after_a_capture_takes_effect(device):
    model = tiny_model("llama", device)
    ids = torch.randint(VOCAB, (2, 9), device=device)
    enable_cuda_graphs(model)
    model(ids, use_cache=False)
    enable_flash_attention(model, FlashAttentionConfig(window_size=(1, 0)))
    got = model(ids, use_cache=False).logits
    disable_cuda_graphs(model)
    torch.testing.assert_close(got, model(ids, use_cache=False).logits)


def test_same_bits_tells_nan_and_signs_apart():
    a = torch.tensor([torch.nan, 0.0, 1.0])
    assert same_bits(a, a.clone())
    assert not same_bits(a, torch.tensor([torch.nan, -0.0, 1.0]))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda x: x * x.sum().item(), "the capture failed"),
        (lambda x: x.add_(1), "writes into its inputs"),
        (lambda x: (x + 1, object()), "its output holds a object"),
    ],
)
def test_what_cannot_be_a_graph_runs_eagerly_with_one_reason(forward, reason, caplog):
    model = nn.Identity().cuda().eval()
    model.forward = forward
    enable_cuda_graphs(model)
    for _ in range(3):
        x = torch.ones(2, device="cuda")
        with caplog.at_level(logging.WARNING, "llamatelemetry"):
            out = model(x)
        out = out[0] if isinstance(out, tuple) else out
        assert out.tolist() == [2.0, 2.0]
    assert reason in caplog.records[0].message
    assert graphs_of(model) == 0


@pytest.mark.gpu
def test_no_more_graphs_than_the_limit():
    model = enable_cuda_graphs(net("cuda"))
    for n in range(1, MAX_GRAPHS + 4):
        model(torch.ones(n, 8, device="cuda"))
    assert graphs_of(model) == MAX_GRAPHS


@pytest.mark.gpu
def test_streams_take_turns():
    model, side = enable_cuda_graphs(net("cuda")), torch.cuda.Stream()
    inputs = [torch.full((64, 8), float(i), device="cuda") for i in range(20)]
    plain = disable_cuda_graphs(copy.deepcopy(model))
    expected = [plain(x)["y"] for x in inputs]
    torch.cuda.synchronize()
    outputs = []
    for i, x in enumerate(inputs):
        with torch.cuda.stream(side if i % 2 else torch.cuda.default_stream()):
            outputs.append(model(x)["y"])
    torch.cuda.synchronize()
    assert all(map(torch.equal, outputs, expected))


@pytest.mark.gpu
def test_on_the_other_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model, x = enable_cuda_graphs(net("cuda:1")), torch.randn(2, 8, device="cuda:1")
    plain = disable_cuda_graphs(copy.deepcopy(model))
    with torch.cuda.device(0):
        for _ in range(2):
            assert torch.equal(model(x)["y"], plain(x)["y"])
    assert graphs_of(model) == 1
