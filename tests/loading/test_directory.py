"""transformers directories: every damage is named, nothing is random, no code is run."""

from __future__ import annotations

import pickle

import pytest
import torch
from directories import END, change, write_directory
from families import VOCAB, tiny_model
from safetensors.torch import load_file, save_file

from llamatelemetry.loading.directory import ADAPTER
from llamatelemetry.loading.find import ModelFileError, find_model, load_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 9\n"
WEIGHTS = "model.safetensors"


def refusal(path, **options):
    with pytest.raises(ModelFileError) as caught:
        load_model(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def path(tmp_path):
    return write_directory(tmp_path / "model")


def weights_without(path, *names):
    tensors = load_file(path / WEIGHTS)
    for name in names:
        del tensors[name]
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        (WEIGHTS, POINTER, "model.safetensors: is a pointer of git LFS"),
        (WEIGHTS, b"", "model.safetensors: is damaged or cut short"),
        (WEIGHTS, b"\x30" + b"\0" * 7 + b"x" * 99, "model.safetensors: is damaged or cut short"),
        (WEIGHTS, 1000, "model.safetensors: is damaged or cut short"),
        (WEIGHTS, -50, "model.safetensors: is damaged or cut short"),
        ("config.json", b"[]", "config.json: must be a JSON object, got list"),
        ("config.json", b"3", "config.json: must be a JSON object, got int"),
        ("config.json", b"{", "config.json: must be JSON"),
        ("config.json", b"\xff\xfe\0", "config.json: must be JSON"),
        ("config.json", POINTER, "config.json: is a pointer of git LFS"),
        ("tokenizer.json", POINTER, "tokenizer.json: is a pointer of git LFS"),
        ("tokenizer.json", b"[]", "tokenizer.json: must be a JSON object"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json: must be a JSON object"),
        ("generation_config.json", b"[]", "generation_config.json: must be a JSON object"),
    ],
)
def test_a_damaged_file_is_named(path, name, data, sentence):
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[:data] if isinstance(data, int) else data)
    assert sentence in refusal(path)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"hidden_size": "x"}, "config.json: transformers cannot read it"),
        ({"hidden_size": 7}, "config.json: transformers cannot read it"),
        ({"num_attention_heads": 0}, "config.json: transformers cannot read it"),
        ({"num_key_value_heads": 0}, "transformers cannot load it: ZeroDivisionError"),
        ({"num_hidden_layers": 5}, "the weights hold no model.layers.2"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers must be that of the weights, 2, got 1"),
        ({"vocab_size": 50}, "model.embed_tokens.weight must be (50, 288) as config.json says"),
        ({"intermediate_size": 9}, "must be (288, 9) as config.json says, got (288, 160) in the"),
        ({"model_type": "no_such"}, "config.json: transformers cannot read it"),
        ({"model_type": "bert"}, "the weights hold no bert.embeddings"),
        ({"hidden_act": "no_such"}, "transformers cannot load it: KeyError: 'no_such'"),
        ({"eos_token_id": "x"}, "config.json: transformers cannot read it"),
    ],
)
def test_a_config_that_is_not_of_the_weights(path, fields, sentence):
    change(path / "config.json", **fields)
    assert sentence in refusal(path)


def test_missing_weights_are_never_random(path):
    weights_without(path, "model.layers.1.mlp.up_proj.weight")
    assert refusal(path).endswith("the weights hold no model.layers.1.mlp.up_proj.weight")


def test_weights_that_are_left_out_are_said(path):
    change(path / "config.json", num_hidden_layers=1)
    with pytest.warns(UserWarning, match=r"layers\.1.* \(and 8 more\) is no part of the model"):
        load_model(path)


def test_shards(tmp_path):
    path, model = tmp_path / "model", tiny_model("llama")
    write_directory(path, model=model)
    (path / WEIGHTS).unlink()
    model.save_pretrained(path, max_shard_size="400KB")
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 2
    loaded = load_model(path).model
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    cut = shards[1].read_bytes()[:-50]
    shards[1].write_bytes(cut)
    assert f"{shards[1].name}: is damaged or cut short" in refusal(path)
    shards[1].unlink()
    assert f"{shards[1].name}: is missing" in refusal(path)
    (path / f"{WEIGHTS}.index.json").write_text("[]")
    assert "index.json: must be a JSON object" in refusal(path)


def test_no_tokenizer_files(path):
    for file in path.glob("*token*"):
        file.unlink()
    assert "it has no tokenizer files" in (said := refusal(path))
    assert "tokenizer.save_pretrained(directory)" in said


def test_no_code_is_run(path, capsys, monkeypatch):
    ran = path / "ran"
    (path / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    change(
        path / "tokenizer_config.json",
        tokenizer_class="No",
        auto_map={"AutoTokenizer": ["own.T", None]},
    )
    assert "it brings code of its own, which is never run here" in refusal(path)
    maps = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    change(path / "config.json", model_type="own", auto_map=maps)
    assert "it brings code of its own, which is never run here" in refusal(path)
    assert capsys.readouterr().out == ""
    assert not ran.exists()


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("a pickle ran code",))


def test_pickles_hold_tensors_alone(path):
    state = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    weights = path / "pytorch_model.bin"
    weights.write_bytes(b"garbage")
    assert "its pickled weights are damaged or hold more than tensors" in refusal(path)
    torch.save({"x": Harmful()}, weights)
    assert "its pickled weights are damaged or hold more than tensors" in refusal(path)
    assert pickle.loads(pickle.dumps(1)) == 1
    torch.save(state, weights)
    assert load_model(path).model.dtype == torch.float32


def test_the_end_of_a_text(path):
    assert load_model(path).eos_ids == ()
    write_directory(path, eos_token="<|end|>")
    assert load_model(path).eos_ids == (END,)  # the tokenizer's, where no config names one
    change(path / "config.json", eos_token_id=3)
    assert load_model(path).eos_ids == (3,)
    change(path / "generation_config.json", eos_token_id=[4, 5])
    assert load_model(path).eos_ids == (4, 5)
    change(path / "generation_config.json", eos_token_id=[4, 10**6])
    with pytest.warns(UserWarning, match="eos_token_id 1000000 is none of the 97 tokens"):
        assert load_model(path).eos_ids == (4,)
    change(path / "generation_config.json", eos_token_id="x")
    assert "eos_token_id must be a token's id or several, got 'x'" in refusal(path)


@pytest.mark.parametrize("device", ["cud", "mps", "meta", "", 3, None, "cuda:99"])
def test_a_device_that_is_none(path, device):
    with pytest.raises(ValueError, match="device must be cpu, cuda or cuda:N") as caught:
        load_model(path, device=device)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "int4", 3])
def test_a_dtype_that_is_none(path, dtype):
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16"):
        load_model(path, dtype=dtype)
    assert load_model(path, dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~no_such_user/x", None, 3, b"x", ""])
def test_a_name_that_is_none(name):
    with pytest.raises(ModelFileError) as caught:
        load_model(name)
    assert len(str(caught.value)) < 500


def test_a_cached_id(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--tiny" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    write_directory(snapshot)
    refs = tmp_path / "models--some--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    assert find_model("some/tiny") == snapshot
    assert load_model("some/tiny").name == "some/tiny"
    with pytest.raises(ModelFileError, match="or the id of a model in the Hugging Face cache"):
        load_model("some/other")


def adapter(path, base):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    model.load_state_dict(load_model(base).model.state_dict())
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    with torch.inference_mode(False):
        adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(path)
    change(path / ADAPTER, base_model_name_or_path=str(base))
    return adapted.eval()


def test_an_adapter_is_merged_into_its_base(tmp_path, path):
    wanted = adapter(tmp_path / "adapter", path)
    ids = torch.tensor([[5, 7, 11, 2]])
    loaded = load_model(tmp_path / "adapter")
    assert (type(loaded.model).__name__, loaded.name) == ("LlamaForCausalLM", "adapter")
    torch.testing.assert_close(loaded.model(ids).logits, wanted(ids).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(load_model(path).model(ids).logits, wanted(ids).logits, atol=1e-2)


def test_an_adapter_with_more_tokens(tmp_path, path):
    peft = pytest.importorskip("peft")
    save = ["embed_tokens", "lm_head"]
    with torch.inference_mode(False):
        model = load_model(write_directory(tmp_path / "base", "mistral")).model
        model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
        config = peft.LoraConfig(
            r=4, init_lora_weights=False, target_modules=["q_proj"], modules_to_save=save
        )
        adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter" / ADAPTER, base_model_name_or_path=str(tmp_path / "base"))
    ids = torch.tensor([[5, 7, VOCAB + 1, 2]])
    ours = load_model(tmp_path / "adapter").model(ids).logits
    torch.testing.assert_close(ours, adapted(ids).logits, atol=1e-4, rtol=1e-4)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    found = {name: x for name, x in load_file(weights).items() if "lm_head" not in name}
    save_file(found, weights)
    assert f"its tokens must be the base model's {VOCAB}, or as many in both" in refusal(
        tmp_path / "adapter"
    )


def test_an_adapter_without_its_weights_or_its_base(tmp_path, path):
    adapter(tmp_path / "adapter", path)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({"x": torch.zeros(1)}, weights)
    assert "adapter: peft cannot load it" in refusal(tmp_path / "adapter")
    change(tmp_path / "adapter" / ADAPTER, base_model_name_or_path="no/such")
    assert "no/such: must be one of" in refusal(tmp_path / "adapter")
    change(tmp_path / "adapter" / ADAPTER, base_model_name_or_path=None)
    assert "base_model_name_or_path must name a model" in refusal(tmp_path / "adapter")
