"""Whatever is done to a patched model, it gives what the same model gives unpatched.

Every way of changing a model is done to two twins, one of them patched; both must answer alike, on
several calls, as a replacement takes up new weights on the second.
"""

from __future__ import annotations

import pickle
import sys

import pytest
import torch
from families import OpCounter, tiny_model
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close
from twins import CALLS, assert_alike, ids_of, twins

from llamatelemetry.models.patching import patch

pytestmark = pytest.mark.filterwarnings("ignore:patch. :UserWarning")

LINEARS = (
    "self_attn.q_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
NORMS = ("input_layernorm", "post_attention_layernorm")


@pytest.fixture(autouse=True)
def _no_inference_mode():
    """As users call models: weights made in inference mode could not be trained."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def new_parameter(part):
    part.weight = nn.Parameter(1.5 * part.weight.detach().flip(0))


def new_data(part):
    part.weight.data = 1.5 * part.weight.detach().flip(0)


def in_place(part):
    part.weight.mul_(-2)


def swapped(part):
    torch.utils.swap_tensors(part.weight, nn.Parameter(part.weight.detach().flip(0).clone()))


def edited(part):
    part.register_forward_hook(lambda module, args, output: output * 2)


def edited_before(part):
    part.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def other_forward(part):
    original = type(part).forward
    part.forward = lambda x: original(part, x) * 2


def other_class(part):
    kind = type(part)
    part.__class__ = type("Other", (kind,), {"forward": lambda self, x: kind.forward(self, x) * 2})


def pruned(part):
    prune.l1_unstructured(part, "weight", 0.5)


def pruned_for_good(part):
    prune.l1_unstructured(part, "weight", 0.5)
    prune.remove(part, "weight")


def parametrised(part):
    parametrizations.weight_norm(part)
    part.parametrizations.weight.original0.mul_(2)


ANY = [
    new_parameter,
    new_data,
    in_place,
    swapped,
    edited,
    edited_before,
    other_forward,
    other_class,
]
OF_LINEARS = [pruned, pruned_for_good, parametrised]
WAYS = [(way, path) for path in (*LINEARS, *NORMS) for way in ANY]
WAYS += [(way, path) for path in LINEARS for way in OF_LINEARS]


@pytest.mark.parametrize(("way", "path"), WAYS, ids=lambda x: getattr(x, "__name__", x))
def test_a_part_is_changed(way, path, device):
    ours, theirs, _ = twins(device)
    before = theirs(ids_of(device)).logits
    for model in (ours, theirs):
        way(model.model.layers[0].get_submodule(path))
    assert not torch.allclose(assert_alike(ours, theirs, device), before)


@pytest.mark.parametrize(("part", "name"), [(path, "weight") for path in LINEARS[:4]])
def test_weights_that_something_else_holds_stay_its(part, name, device):
    ours, theirs, report = twins(device)
    held = []
    for model in (ours, theirs):
        weight = getattr(model.model.layers[0].get_submodule(part), name)
        weight.data = weight.detach().clone()
        held.append(weight.data)
    assert_alike(ours, theirs, device)
    for tensor in held:
        tensor.mul_(-2)
    assert_alike(ours, theirs, device)
    if part != "self_attn.o_proj":  # it is called, and no copy of it made
        assert "holds the memory" in next(iter(report.refused.values()))


def test_all_weights_from_a_vector(device):
    ours, theirs, _ = twins(device)
    vectors = []
    for model in (ours, theirs):
        vectors.append(0.9 * nn.utils.parameters_to_vector(model.parameters()).detach())
        nn.utils.vector_to_parameters(vectors[-1], model.parameters())
    assert_alike(ours, theirs, device)
    for vector in vectors:
        vector.mul_(0.8)
    assert_alike(ours, theirs, device)


def test_weights_of_one_call(device):
    ours, theirs, _ = twins(device)
    ids = ids_of(device)
    other = {name: nn.Parameter(0.5 * p) for name, p in theirs.named_parameters()}
    for _ in range(CALLS):
        want = functional_call(theirs, other, (ids,)).logits
        assert_close(functional_call(ours, other, (ids,)).logits, want, atol=2e-4, rtol=1e-4)
        assert_alike(ours, theirs, device)


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        ("layers.0.input_layernorm", "variance_epsilon", 1.0),
        ("layers.0.post_attention_layernorm", "variance_epsilon", 1.0),
        ("layers.0.self_attn", "scaling", 1.0),
        ("layers.0.self_attn", "is_causal", False),
        ("layers.0.mlp", "act_fn", nn.ReLU()),
    ],
)
def test_a_number_or_function_is_changed(owner, name, value, device):
    ours, theirs, _ = twins(device)
    for model in (ours, theirs):
        setattr(model.model.get_submodule(owner), name, value)
    assert_alike(ours, theirs, device)


def test_a_function_of_the_models_file_is_changed(device, monkeypatch):
    ours, theirs, report = twins(device)
    before = ours(ids_of(device)).logits
    file = sys.modules[type(theirs).__module__]
    with monkeypatch.context() as context:
        context.setattr(file, "apply_rotary_pos_emb", lambda q, k, *_, **__: (q, k))
        assert not torch.allclose(assert_alike(ours, theirs, device), before)
        assert "kind" in report.refused["model.layers.0.self_attn"]
        # Attention of transformers 5.10 holds the function, so that no model is pickled meanwhile.
        if not hasattr(theirs.model.layers[0].self_attn, "_hidden_kernels"):
            pickle.dumps(ours)
    assert_alike(ours, theirs, device)
    assert report.refused == {}


def test_hooks_that_go_again(device):
    ours, theirs, report = twins(device)
    handle = ours.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"layers\.0\.mlp runs its own forward: gate_proj carries"):
        ours(ids_of(device))
    assert "gate_proj carries forward hooks" in report.refused["model.layers.0.mlp"]
    handle.remove()
    assert_alike(ours, theirs, device)
    assert report.refused == {}


def test_hooks_of_every_module(device):
    ours, theirs, _ = twins(device)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 1.5 if isinstance(module, nn.Linear) else None
    )
    try:
        assert_alike(ours, theirs, device)
    finally:
        handle.remove()


@pytest.mark.parametrize("path", ["mlp.gate_proj", "self_attn", "mlp", "", "input_layernorm"])
def test_a_probe_runs_no_hooks(path, device):
    model, seen = tiny_model("llama", device), []
    model.model.layers[0].get_submodule(path).register_forward_hook(lambda *_: seen.append(1))
    patch(model)
    assert seen == []
    model(ids_of(device))
    assert seen == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype, device):
    ours, theirs, _ = twins(device)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    ids = ids_of(device)
    with torch.autocast(device.type, torch.bfloat16):
        close = ours(ids).logits.float() - theirs(ids).logits.float()
    assert close.norm() < 0.05 * theirs(ids).logits.float().norm()
    assert_close(ours(ids).logits, theirs(ids).logits, atol=2e-1, rtol=1e-1)


def test_double_and_back(device):
    ours, theirs, _ = twins(device)
    assert_alike(ours.double(), theirs.double(), device)
    assert_alike(ours.float(), theirs.float(), device)


def test_a_frozen_model_needs_no_mode(device):
    ours, theirs, _ = twins(device)
    with torch.enable_grad():
        for model in (ours, theirs):
            model.requires_grad_(False)
        with OpCounter() as counter:
            ours(ids_of(device))
        assert counter.calls["llamatelemetry::fused_add_rms_norm_"]
        assert_alike(ours, theirs, device)
        gradients = []
        for model in (ours, theirs):  # a soft prompt
            x = model.get_input_embeddings()(ids_of(device)).detach().requires_grad_()
            model(inputs_embeds=x).logits.square().mean().backward()
            gradients.append(x.grad)
    assert_close(*gradients, atol=1e-4, rtol=1e-3)


def test_models_of_inference_mode(device):
    with torch.inference_mode():
        model = tiny_model("llama", device)
        before = model(ids_of(device)).logits
    assert patch(model).refused == {}
    assert_close(model(ids_of(device)).logits, before)


def test_models_without_memory(device):
    model = tiny_model("llama", device).to("meta")
    report = patch(model)
    assert "got weight on the meta device" in report.refused["model.norm"]
    assert not report.replaced


@pytest.mark.parametrize("change", [new_parameter, new_data])
def test_a_compiled_model_is_changed(change, device):
    ours, theirs, _ = twins(device)
    compiled, ids = torch.compile(ours, backend="aot_eager", fullgraph=True), ids_of(device)
    assert_close(compiled(ids).logits, theirs(ids).logits, atol=2e-4, rtol=1e-4)
    for model in (ours, theirs):
        change(model.model.layers[0].mlp.gate_proj)
    assert_close(compiled(ids).logits, theirs(ids).logits, atol=2e-4, rtol=1e-4)


def test_a_compiled_model_with_gradients_is_one_graph(device):
    for family in ("llama", "starcoder2"):  # gated and ungated
        model, ids = tiny_model(family, device), ids_of(device)
        wanted = model(ids).logits
        patch(model)
        with torch.inference_mode(False), torch.enable_grad():
            ids = ids.clone()
            logits = torch.compile(model, backend="eager", fullgraph=True)(ids).logits
        assert_close(logits.detach(), wanted, atol=2e-4, rtol=1e-4)
