"""Models that the packed steps do not serve generate by transformers' own forward."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from directories import write_directory
from engines import NEW_TOKENS, PROMPTS, rows_of
from families import tiny_model
from hf_models import TINY_SIZES

from llamatelemetry.inference.engine import InferenceEngine
from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.packed import patch_or_reason
from llamatelemetry.inference.sampling import SamplingParams
from llamatelemetry.loading.find import load_model
from llamatelemetry.models.patching import patch

_SIZES = {
    "vocab_size": 97,
    **TINY_SIZES,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
# Classes with caches and attention of their own kinds.
CLASSES = {
    "Bloom": {"n_layer": 2, "n_head": 4},
    "CodeGen": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "Mamba": {"state_size": 8},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "RecurrentGemma": {
        "lru_width": 64,
        "block_types": ["recurrent", "attention"],
        "attention_window_size": 8,
        "head_dim": 16,
    },
    "Rwkv": {"attention_hidden_size": 64},
}


def random_model(name, **options):
    config = getattr(transformers, f"{name}Config")(**(_SIZES | options))
    with torch.inference_mode(False), torch.no_grad():
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            parameter.normal_(parameter.dim() == 1, 0.15)
    return model


def by_transformers(model, prompt):
    if model.config.model_type == "recurrent_gemma":  # its cache is not whole in older releases
        ids = list(prompt)
        for _ in range(NEW_TOKENS):
            logits = model(torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
        return ids[len(prompt) :]
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=-1,
    )
    return out[0, len(prompt) :].tolist()


class Engine:
    """What rows_of needs of an engine."""

    def __init__(self, model, reason="its class has no row"):
        self.generator = TokenGenerator(model, reason)


@pytest.mark.filterwarnings("ignore:.*by transformers' own forward")
@pytest.mark.parametrize("name", list(CLASSES))
def test_tokens_are_those_of_generate(name):
    model = random_model(name, **CLASSES[name])
    engine = Engine(model)
    assert rows_of(engine, PROMPTS) == [by_transformers(model, prompt) for prompt in PROMPTS]
    assert engine.generator.decode_mode == "transformers"
    warm = SamplingParams(temperature=1.5, seed=3)
    alone = rows_of(engine, PROMPTS[:1], warm)
    assert rows_of(engine, PROMPTS, warm)[:1] == alone


@pytest.mark.filterwarnings("ignore:.*by transformers' own forward")
def test_ends_stops_and_threads():
    model = random_model("Bloom", **CLASSES["Bloom"])
    engine = Engine(model)
    whole = rows_of(engine, PROMPTS, SamplingParams(temperature=1.0, seed=1))
    params, end = SamplingParams(temperature=1.0, seed=1), whole[0][4]
    for row, cut in zip(whole, rows_of(engine, PROMPTS, params, (end,)), strict=True):
        assert cut == row[: row.index(end) + 1 if end in row else NEW_TOKENS]
    stopped: set[int] = set()
    for i, step in enumerate(
        engine.generator.generate(PROMPTS, [params] * 3, NEW_TOKENS, (), stopped)
    ):
        assert (step[1] is None) == (i > 2)
        if i == 2:
            stopped.add(1)
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda p: rows_of(engine, [p], params)[0], PROMPTS * 3)
    assert list(found) == [rows_of(engine, [p], params)[0] for p in PROMPTS] * 3


def test_longrope_past_its_short_table():
    """Against the whole row again, as generate without a cache: with one, Phi3's drops the prompt
    where the table changes and other classes' keeps keys that are turned by both tables."""
    options = {
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 16,
        },
    }
    model = random_model("Phi3", **options)
    prompt = PROMPTS[2]
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
    whole = torch.tensor([prompt])
    uncached = model.generate(
        whole, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=False, pad_token_id=0
    )
    assert uncached[0].tolist() == ids
    patch(model)
    with pytest.warns(UserWarning, match="own forward: rope_type must have one table"):
        assert rows_of(Engine(model, None), [prompt]) == [ids[len(prompt) :]]


def test_the_engine_says_once_what_it_does_not_serve(tmp_path):
    model = random_model("Bloom", **CLASSES["Bloom"])
    path = write_directory(tmp_path / "model", model=model)
    engine = InferenceEngine(load_model(path))
    with pytest.warns(UserWarning, match="BloomForCausalLM generates by transformers' own forward"):
        text = engine.infer("abc", 8, 0.0).text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "".join(engine.stream("abc", None, 8)) == text
        assert engine.infer_batch(["abc"], max_tokens=8) == [text]
        with pytest.raises(ValueError, match="token ids must lie in"):
            engine.stream([97])


def test_hooks_run_as_long_as_they_are_there():
    model, seen = tiny_model("llama"), []
    patch(model)
    engine = Engine(model, None)
    packed = rows_of(engine, PROMPTS)
    layer = model.model.layers[0]
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="own forward.*hooks"):
        assert rows_of(engine, PROMPTS[:1]) == packed[:1]
    assert (len(seen), engine.generator.decode_mode) == (NEW_TOKENS, "transformers")
    handle.remove()
    assert rows_of(engine, PROMPTS) == packed
    assert engine.generator.decode_mode != "transformers"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", ["before", "after"])
def test_offloaded_weights(when):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama")
    wanted = [by_transformers(model, prompt) for prompt in PROMPTS]
    if when == "before":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    _, reason = patch_or_reason(model)
    engine = Engine(model, reason)
    if when == "after":
        assert rows_of(engine, PROMPTS) == wanted
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert rows_of(engine, PROMPTS) == wanted
    assert engine.generator.decode_mode == "transformers"


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_is_added_counts():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    patch(model)
    engine = Engine(model, None)
    before = rows_of(engine, PROMPTS)
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    with torch.inference_mode(False):
        adapted = peft.get_peft_model(model, config).eval()
    after = rows_of(engine, PROMPTS)
    assert after != before
    assert after == [by_transformers(model, prompt) for prompt in PROMPTS]
    with adapted.disable_adapter():
        assert rows_of(engine, PROMPTS) == before


@pytest.mark.parametrize("what", ["lm_head", "embed_tokens", "norm"])
def test_replaced_modules_are_followed(what):
    model = tiny_model("mistral")  # nothing of it is tied
    patch(model)
    engine = Engine(model, None)
    before = rows_of(engine, PROMPTS)
    with torch.inference_mode(False):
        if what == "norm":
            new = type(model.model.norm)(model.config.hidden_size)
            new.weight.data.normal_(1.0, 0.5)
            model.model.norm = new
        elif what == "lm_head":
            model.set_output_embeddings(torch.nn.Linear(model.config.hidden_size, 97, bias=False))
        else:
            model.set_input_embeddings(torch.nn.Embedding(97, model.config.hidden_size))
    after = rows_of(engine, PROMPTS)
    assert after != before
    assert after == [by_transformers(model, prompt) for prompt in PROMPTS]


def test_a_hook_on_the_head_runs_in_every_step():
    model, seen = tiny_model("llama"), []
    patch(model)
    engine = Engine(model, None)
    before = rows_of(engine, PROMPTS[:1])
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    assert rows_of(engine, PROMPTS[:1]) == before
    assert len(seen) == NEW_TOKENS
    model.lm_head.register_forward_hook(lambda *args: -args[2])
    assert rows_of(engine, PROMPTS[:1]) != before
