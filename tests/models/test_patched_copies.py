"""Copies of patched models, and what peft, accelerate and torchao do to them."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile

import pytest
import torch
from families import PackedRun, quantise_, tiny_model
from torch.testing import assert_close
from twins import assert_alike, ids_of, twins

from llamatelemetry.models.opset import REFERENCE
from llamatelemetry.models.patching import patch, unpatch

pytestmark = pytest.mark.filterwarnings("ignore:patch. :UserWarning")

LINEARS = tuple(
    f"{part}.{name}_proj"
    for part, names in (("self_attn", "qvo"), ("mlp", ("gate", "up", "down")))
    for name in names
)


@pytest.fixture(autouse=True)
def _no_inference_mode():
    """As users call models: weights made in inference mode could not be trained."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@pytest.mark.parametrize("ops", [{}, {"ops": REFERENCE}], ids=["ours", "reference"])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_a_patched_model_of_its_own(way, ops, device):
    model = tiny_model("llama", device)
    report = patch(model, **ops)
    twin = way(model)
    assert patch(twin, **ops) == report
    before = model(ids_of(device)).logits
    for path in LINEARS:
        twin.model.layers[0].get_submodule(path).weight.mul_(-3)
    got = twin(ids_of(device)).logits
    assert_close(PackedRun(twin, 1).step([ids_of(device)[0]]), got[:, -1], atol=2e-4, rtol=1e-4)
    unpatch(twin)
    assert_close(got, twin(ids_of(device)).logits, atol=2e-4, rtol=1e-4)
    assert_close(model(ids_of(device)).logits, before)
    q, k = (getattr(model.model.layers[0].self_attn, name).weight for name in ("q_proj", "k_proj"))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


def test_a_saved_model(device):
    ours, theirs, _ = twins(device)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    assert_alike(torch.load(file, weights_only=False), theirs, device)


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "quantised"])
def test_a_state_dict_has_tensors_apart(quantised, device):
    """accelerate and the hub save one of the tensors of a storage alone."""
    model = tiny_model("llama_bias", device)
    if quantised:
        quantise_(model)
    count = len({x.untyped_storage().data_ptr() for x in model.state_dict().values()})
    want = model(ids_of(device)).logits
    patch(model, strict=True)
    state = model.state_dict()
    assert len({x.untyped_storage().data_ptr() for x in state.values()}) == count
    before = {key: value.clone() for key, value in state.items()}
    for value in state.values():
        value.zero_()
    assert not model(ids_of(device)).logits.any()
    model.load_state_dict(before)
    assert_close(model(ids_of(device)).logits, want, atol=2e-4, rtol=1e-4)
    unpatch(model)
    assert not any(module._state_dict_hooks for module in model.modules())


def test_a_trained_copy(device):
    ours, theirs, _ = twins(device)
    ids, models = ids_of(device), [copy.deepcopy(ours), copy.deepcopy(theirs)]
    with torch.enable_grad():
        for model in models:
            optimiser = torch.optim.SGD(model.train().parameters(), 0.05)
            for _ in range(3):
                model(ids, labels=ids).loss.backward()
                optimiser.step()
                optimiser.zero_grad()
            model.eval()
    assert_alike(*models, device)
    assert_alike(ours, theirs, device)


LORA = {"r": 4, "init_lora_weights": False}
TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]


@pytest.mark.parametrize("first", ["patch", "lora"])
def test_lora(first, device):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=TARGETS, **LORA)
    models = [tiny_model("llama", device)]
    models.append(copy.deepcopy(models[0]))
    adapted = []
    for i, model in enumerate(models):
        if first == "patch" and i == 0:
            patch(model)
            model(ids_of(device))
        torch.manual_seed(1)
        adapted.append(peft.get_peft_model(model, config).eval())
        if first == "lora" and i == 0:
            patch(model)
    ours, theirs = adapted
    on = assert_alike(ours, theirs, device)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert not torch.allclose(assert_alike(ours, theirs, device), on)
    for model in adapted:
        torch.manual_seed(2)
        model.add_adapter("second", config)
        model.set_adapter("second")
    assert not torch.allclose(assert_alike(ours, theirs, device), on)
    for step in ("merge_adapter", "unmerge_adapter", "merge_and_unload"):
        for model in adapted:
            getattr(model, step)()
        assert_alike(*models, device)
    ids = ids_of(device)
    packed = PackedRun(models[0], 1).step([ids[0]])
    assert_close(packed, models[1](ids).logits[:, -1], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offload(where, when, device):
    accelerate = pytest.importorskip("accelerate")
    ours = tiny_model("llama", device)
    theirs = copy.deepcopy(ours)
    if when == "after":
        patch(ours)
        ours(ids_of(device))
    for model in (ours, theirs):
        if where == "cpu":
            accelerate.cpu_offload(model, execution_device=device)
        else:
            accelerate.disk_offload(model, tempfile.mkdtemp(), execution_device=device)
    if when == "before":
        assert "on the meta device" in patch(ours).refused["model.layers.0.mlp"]
    want = assert_alike(ours, theirs, device)
    unpatch(ours)
    assert_close(ours(ids_of(device)).logits, want)
    if where == "cpu":
        for model in (ours, theirs):
            accelerate.hooks.remove_hook_from_submodules(model)
        assert_alike(ours, theirs, device)


@pytest.mark.parametrize("when", ["after", "before"])
def test_torchao(when, device):
    quantization = pytest.importorskip("torchao.quantization")
    ours = tiny_model("llama", device)
    theirs = copy.deepcopy(ours)
    if when == "after":
        patch(ours)
    for model in (ours, theirs):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    if when == "before":
        patch(ours)
    assert_alike(ours, theirs, device)
