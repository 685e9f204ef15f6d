"""A model that changes while a generation is open: the next token is of the model as it is then."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from families import tiny_model
from stepwise import COUNT, PROMPT, SOON, stepwise, twins
from torch import nn

from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.flash_attn import enable_flash_attention
from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.kv_cache import optimize_kv_cache
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.models.patching import patch

pytestmark = pytest.mark.filterwarnings("ignore")


def swap_downs(model):
    one, two = (layer.mlp for layer in model.model.layers[:2])
    one.down_proj, two.down_proj = two.down_proj, one.down_proj


def new_norm_data(model):
    weight = model.model.norm.weight
    weight.data = -weight.data.flip(0).contiguous()


def new_final_norm(model):
    old = model.model.norm
    norm = type(old)(old.weight.shape[0]).to(old.weight.device)
    with torch.no_grad():
        norm.weight.copy_(-old.weight)
    model.model.norm = norm.eval()


def other_eps(model):
    for layer in model.model.layers:
        layer.post_attention_layernorm.variance_epsilon = 4.0


def other_scaling(model):
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.9


CHANGES = [swap_downs, new_norm_data, new_final_norm, other_eps, other_scaling]


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "quantised"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda one: one.__name__)
def test_an_open_generation_follows(change, quantised, device):
    model, ours = twins(device=device, quantised=quantised)
    generator = TokenGenerator(ours)
    steps = generator.generate([PROMPT], [GREEDY], COUNT)
    tokens = [next(steps)[0] for _ in range(SOON)]
    change(ours)
    tokens += [token for (token,) in steps]
    if device.type == "cpu":
        assert generator.decode_mode == "recorded"
    before, wanted = stepwise(model), stepwise(model, change)
    assert before != wanted
    assert tokens == wanted


@pytest.mark.parametrize("change", CHANGES, ids=lambda one: one.__name__)
def test_an_open_request_follows(change, device):
    model, ours = twins(device=device, quantised=True)
    batcher = ContinuousBatching(2, ours, overlap=False)  # with it, a token more is as it was
    handle = batcher.submit(PROMPT, max_tokens=COUNT)
    while handle.request.num_drawn < SOON:
        batcher.step()
    change(ours)
    batcher.run()
    assert handle.result().token_ids == stepwise(model, change, at=SOON)


def test_a_hook_of_an_open_recording_is_not_left_out():
    _, ours = twins(quantised=True)
    steps = TokenGenerator(ours).generate([PROMPT], [GREEDY], COUNT)
    for _ in range(SOON):
        next(steps)
    called = []
    ours.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: called.append(1))
    with pytest.raises(RuntimeError, match=r"forward hooks.*; remove them, or begin again"):
        list(steps)
    list(TokenGenerator(ours).generate([PROMPT], [GREEDY], 3))
    assert len(called) == 3


def test_a_hook_of_an_open_request_is_not_left_out():
    model, ours = twins(quantised=True)
    batcher = ContinuousBatching(2, ours)
    handle = batcher.submit(PROMPT, max_tokens=COUNT)
    while handle.request.num_drawn < SOON:
        batcher.step()
    hook = ours.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: None)
    batcher.run()
    with pytest.raises(RuntimeError, match="remove them, or begin again"):
        handle.result()
    hook.remove()
    assert batcher.submit(PROMPT, max_tokens=COUNT).result().token_ids == stepwise(model)


def fewer_layers(model):
    model.model.layers = nn.ModuleList(list(model.model.layers)[:1])
    model.config.num_hidden_layers = 1


def other_angles(model):
    with torch.no_grad():
        model.model.rotary_emb.inv_freq.mul_(0.25)


def other_angle_scaling(model):
    model.model.rotary_emb.attention_scaling = 1.7


def other_logits(model):
    model.logit_scale = -1.0


def other_embedding(model):
    model.model.embedding_multiplier = 0.1


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", fewer_layers),
        ("llama", other_angles),
        ("llama", other_angle_scaling),
        ("cohere", other_logits),
        ("granite", other_embedding),
    ],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_the_next_generation_follows(family, change, device):
    model, ours = twins(family, device)
    optimize_kv_cache(ours)
    generator = TokenGenerator(ours)

    def tokens():
        return [token for (token,) in generator.generate([PROMPT], [GREEDY], COUNT)]

    def generated():
        ids = torch.tensor([PROMPT], device=device)
        out = ours.generate(ids, max_new_tokens=COUNT, do_sample=False, eos_token_id=None)
        return out[0, len(PROMPT) :].tolist()

    before = stepwise(model)
    assert tokens() == generated() == before
    change(model), change(ours)
    wanted = stepwise(model)
    assert wanted != before
    assert tokens() == wanted
    assert generated() == wanted


def test_doubles_and_autocast_go_by_the_models_own_forward():
    model, ours = twins()
    optimize_kv_cache(ours)
    generator = TokenGenerator(ours)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (tokens,) = zip(*generator.generate([PROMPT], [GREEDY], COUNT), strict=True)
        assert generator.decode_mode == "transformers"
        assert len(tokens) == COUNT
        assert tokens[0] == stepwise(model)[0]  # later ones are near-ties in bfloat16
        batcher = ContinuousBatching(2, ours)
        assert len(batcher.submit(PROMPT, max_tokens=3).result().token_ids) == 3
    model.double(), ours.double()
    (tokens,) = zip(*generator.generate([PROMPT], [GREEDY], COUNT), strict=True)
    assert list(tokens) == stepwise(model)
    ids = torch.tensor([PROMPT])
    out = ours.generate(ids, max_new_tokens=COUNT, do_sample=False, eos_token_id=None)
    assert out[0, len(PROMPT) :].tolist() == stepwise(model)


@pytest.mark.parametrize("way", [patch, enable_flash_attention])
def test_a_pickle_runs_in_a_process_that_has_not_patched(way, tmp_path):
    model = tiny_model("llama", "cpu")
    with torch.inference_mode(False), torch.no_grad():
        ours = copy.deepcopy(model)
    way(ours)
    (tmp_path / "model").write_bytes(pickle.dumps(ours))
    script = (
        "import pickle, sys, torch\n"
        "model = pickle.load(open(sys.argv[1], 'rb'))\n"
        f"with torch.no_grad(): print(float(model(torch.tensor([{PROMPT}])).logits.abs().sum()))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "model")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    with torch.no_grad():
        wanted = model(torch.tensor([PROMPT])).logits.abs().sum()
    assert float(ran.stdout) == pytest.approx(float(wanted), rel=1e-4)


def _other_eps(model):
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 3.0


def _other_weights(model):
    with torch.inference_mode(False), torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(-2)


def _other_data(model):
    for layer in model.model.layers:  # as merging an adapter does
        layer.mlp.up_proj.weight.data.mul_(-2)


@pytest.mark.parametrize("change", [_other_eps, _other_weights, _other_data])
def test_no_prefix_of_the_model_before(change, device):
    plain, ours = twins(device=device)
    prompt = (PROMPT * 9)[:100]  # a whole block of 64 and more
    batcher = ContinuousBatching(2, ours)
    before = batcher.submit(prompt, max_tokens=COUNT).result().token_ids
    assert before == stepwise(plain, prompt=prompt)
    change(plain), change(ours)
    wanted = stepwise(plain, prompt=prompt)
    assert wanted != before
    handle = batcher.submit(prompt, max_tokens=COUNT)
    assert handle.result().token_ids == wanted
    assert handle.stats.cached_tokens == 0
    batcher.submit(prompt, max_tokens=COUNT).result()
    again = batcher.submit(prompt, max_tokens=COUNT)
    assert again.result().token_ids == wanted
    assert again.stats.cached_tokens > 0
