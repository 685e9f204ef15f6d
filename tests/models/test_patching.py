"""A patched transformers model gives what it gave before: logits, tokens, state_dict."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from families import FAMILIES, IN_DTYPES, LAYERS, VOCAB, OpCounter, PackedRun, tiny_model
from tolerance import assert_within_2x
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

from llamatelemetry.models.patching import forward_tokens, patch, unpatch
from llamatelemetry.models.pieces.norm import norm_piece
from llamatelemetry.models.stack import stack_of

LENGTHS = (4, 9, 1)
LONGEST = 9
NEW_TOKENS = 7
EAGER_WITH_WINDOW = ("gemma2", "vaultgemma")  # see "Right padding" in docs/models.md


def padded_batch(side, device="cpu"):
    """ids and attention mask [3, LONGEST], rows of LENGTHS tokens padded on one side.

    The same on every device: of other ids one may be a tie of experts, which rounding decides.
    """
    ids = torch.randint(VOCAB, (len(LENGTHS), LONGEST)).to(device)
    index = torch.arange(LONGEST, device=device)
    lengths = torch.tensor(LENGTHS, device=device).unsqueeze(1)
    mask = index < lengths if side == "right" else index >= LONGEST - lengths
    return ids, mask.long()


def positions_of(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def exact_twin(model, family, device):
    twin = tiny_model(family, device, torch.float64)
    twin.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    return twin


@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "dtype"), IN_DTYPES)
def test_padded_logits(family, side, cache, device, dtype):
    ids, mask = padded_batch(side, device)
    model = tiny_model(family, device, dtype)
    twin = exact_twin(model, family, device)

    def logits(model):
        """A prompt of LONGEST slots; where there is a cache, two more tokens one at a time."""
        past = {
            None: lambda: None,
            "dynamic": lambda: DynamicCache(config=model.config),
            "static": lambda: StaticCache(config=model.config, max_cache_len=LONGEST + 5),
        }[cache]()
        outputs, seen, tokens = [], mask, ids
        for _ in range(1 if past is None else 3):
            positions = positions_of(seen)[:, -tokens.shape[1] :]
            out = model(tokens, attention_mask=seen, position_ids=positions, past_key_values=past)
            outputs.append(out.logits)
            seen = torch.cat([seen, seen.new_ones(len(LENGTHS), 1)], 1)
            tokens = ids[:, :1]
        outputs[0] = outputs[0][mask.bool()]
        return [out.flatten(0, -2) for out in outputs]

    theirs, exact = logits(model), logits(twin)
    patch(model)
    for ours, same_dtype, ref64 in zip(logits(model), theirs, exact, strict=True):
        assert_within_2x(ours, same_dtype, ref64)


@pytest.mark.parametrize(("family", "dtype"), IN_DTYPES)
def test_every_replacement_is_kept(family, device, dtype):
    model = tiny_model(family, device, dtype)
    stack = stack_of(model)
    spec, norm = stack.spec, norm_piece(stack.spec)
    there = [getattr(stack.layers[0], name) for name in spec.norms]
    norms = [x for x in there if x is not None and not isinstance(x, torch.nn.Identity)]
    report = patch(model)
    assert report.refused == {}
    assert report.replaced == Counter(
        {norm.__name__: len(norms) * LAYERS + 1},
        Attention=LAYERS,
        GatedMlp=LAYERS * (spec.mlp_kind == "gated"),
        UngatedMlp=LAYERS * (spec.mlp_kind == "ungated"),
        DecoderLayer=LAYERS,
    )
    assert patch(model) is report


@pytest.mark.parametrize(("family", "dtype"), IN_DTYPES)
def test_unpatch_restores_everything(family, device, dtype):
    model = tiny_model(family, device, dtype)
    ids, mask = padded_batch("left", device)
    modules = dict(model.named_modules())
    attributes = {name: dict(vars(module)) for name, module in modules.items()}
    parameters = dict(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    implementation = model.config._attn_implementation
    before = model(ids, attention_mask=mask).logits

    def same_state():
        now = model.state_dict()
        return list(now) == list(state) and all(torch.equal(now[k], state[k]) for k in state)

    patch(model)
    assert same_state()
    assert model.config._attn_implementation == "llamatelemetry"
    unpatch(model)
    assert same_state()
    assert model.config._attn_implementation == implementation
    assert all(now is modules[name] for name, now in model.named_modules())
    assert all(now is parameters[name] for name, now in model.named_parameters())
    for name, module in modules.items():
        assert vars(module).keys() == attributes[name].keys(), name
    storages = {p.untyped_storage().data_ptr() for p in parameters.values()}
    assert len(storages) == len(parameters)
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    unpatch(model)


def greedy(model, ids, mask, **options):
    """Greedy tokens, and how far the best logit is ahead of the second at each."""
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
        **options,
    )
    best = torch.stack(out.logits, 1).topk(2).values
    return out.sequences[:, ids.shape[1] :], best[..., 0] - best[..., 1]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_the_same_tokens(family, side, cache, device):
    model = tiny_model(family, device)
    ids, mask = padded_batch(side, device)
    options = {"cache_implementation": cache, "disable_compile": True}
    theirs, margins = greedy(model, ids, mask, **options)
    patch(model)
    ours, _ = greedy(model, ids, mask, **options)
    for row, length in enumerate(LENGTHS):
        if side == "right" and family in EAGER_WITH_WINDOW and length < LONGEST:
            continue  # it goes on from a padding slot that sees no token
        differs = (ours[row] != theirs[row]).nonzero().flatten().tolist()
        assert not differs or margins[row, differs[0]] < 1e-3


@pytest.mark.parametrize(("family", "side"), [("qwen2", "left"), ("llama", "right")])
def test_attention_is_ours_with_padding(family, side, device):
    """Nothing falls back to torch's attention, which would be right too."""
    model = tiny_model(family, device)
    patch(model)
    with OpCounter() as counter:
        greedy(model, *padded_batch(side, device))
    assert counter.calls["llamatelemetry::paged_attention"] >= NEW_TOKENS * LAYERS
    assert not any("scaled_dot_product" in name for name in counter.calls)


def test_a_replacement_that_differs_is_refused_by_name(device):
    model = tiny_model("llama", device)
    norm = model.model.layers[1].input_layernorm

    class OffsetNorm(type(norm)):
        def forward(self, x):
            return super().forward(x) + x * 1e-3

    norm.__class__ = OffsetNorm
    ids, mask = padded_batch("left", device)
    before = model(ids, attention_mask=mask).logits
    with pytest.warns(UserWarning, match=r"layers\.1\.input_layernorm: .* errs by"):
        report = patch(model)
    assert list(report.refused) == ["model.layers.1.input_layernorm"]
    assert "errs by" in report.refused["model.layers.1.input_layernorm"]
    after = model(ids, attention_mask=mask).logits
    assert_close(after[mask.bool()], before[mask.bool()])
    with pytest.raises(ValueError, match=r"patched as a whole, got .*layers\.1\.input_layernorm"):
        forward_tokens(model, ids[0], None, None)


def test_an_activation_without_an_op_leaves_the_mlp(device):
    model = tiny_model("llama", device)
    model.config.hidden_act = "relu"
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.ReLU()
    ids = torch.randint(VOCAB, (1, 5), device=device)
    before = model(ids).logits[:, -1]
    with pytest.warns(UserWarning, match="got 'relu'"):
        report = patch(model)
    assert set(report.refused) == {f"model.layers.{i}.mlp" for i in range(LAYERS)}
    assert "got 'relu'" in report.refused["model.layers.0.mlp"]
    assert_close(PackedRun(model, 1).step([ids[0]]), before)


def test_weights_loaded_or_moved_later_are_used(device):
    model = tiny_model("llama_bias", device)
    ids = torch.randint(VOCAB, (1, 7), device=device)
    patch(model)
    for assign in (False, True):
        other = tiny_model("llama_bias", device)
        model.load_state_dict(other.state_dict(), assign=assign)
        assert_close(model(ids).logits, other(ids).logits)
    model.to(torch.float64).to(torch.float32)
    assert_close(model(ids).logits, other(ids).logits)
    assert_close(PackedRun(model, 1).step([ids[0]]), other(ids).logits[:, -1])
    q, k = model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj
    assert q.weight.untyped_storage().data_ptr() == k.weight.untyped_storage().data_ptr()


def test_a_copy_is_patched_and_on_its_own(device):
    model = tiny_model("qwen3", device)
    ids = torch.randint(VOCAB, (1, 7), device=device)
    patch(model)
    before = model(ids).logits
    with torch.inference_mode(False):
        twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert_close(twin(ids).logits, before)


def test_gradients_go_through_the_modules_own_forward(device):
    model = tiny_model("qwen2", device)
    ids, mask = padded_batch("left", device)

    def gradient():
        with torch.inference_mode(False), torch.enable_grad():
            model.zero_grad()
            logits = model(ids.clone(), attention_mask=mask.clone()).logits
            logits[mask.clone().bool()].square().sum().backward()
            return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    before = gradient()
    patch(model)
    assert_close(gradient(), before)


def test_save_and_load(device, tmp_path):
    model = tiny_model("llama", device)
    ids = torch.randint(VOCAB, (1, 7), device=device)
    patch(model)
    with torch.inference_mode(False):
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).to(device).eval()
    assert loaded.config._attn_implementation != "llamatelemetry"
    assert_close(loaded(ids).logits, model(ids).logits)


def test_another_class_is_refused():
    with pytest.raises(ValueError, match=r"must have decoder layers of a class .*, got Linear"):
        patch(torch.nn.Linear(2, 2))
