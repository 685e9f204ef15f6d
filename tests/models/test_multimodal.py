"""Models that take images: patched inside, and packed where the engine gives them text alone."""

from __future__ import annotations

import pytest
import torch
from directories import tiny_tokenizer
from families import VOCAB
from multimodal import MODELS, TEXT, tiny_multimodal
from torch.testing import assert_close

from llamatelemetry.inference.engine import InferenceEngine
from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.kv_cache import optimize_kv_cache
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.loading.find import load_model
from llamatelemetry.models.patching import patch, unpatch

NEW_TOKENS = 12
GREEDILY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}


@pytest.mark.parametrize("name", list(MODELS))
def test_images_and_text(name, device):
    model, inputs = tiny_multimodal(name, device)
    rotary = getattr(model.model.language_model, "rotary_emb", None)
    if name == "Qwen2VL" and not hasattr(rotary, "mrope_section"):
        pytest.skip("the attention of this transformers' class turns by three tables")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    texts = [torch.randint(2, VOCAB - 4, (n,), device=device) for n in (1, 17)]
    logits = model(**inputs).logits
    answer = model.generate(**inputs, **GREEDILY)
    answers = [
        model.generate(text[None], attention_mask=torch.ones_like(text[None]), **GREEDILY)
        for text in texts
    ]
    report = patch(model, strict=True)
    assert report.not_packed is None
    assert report.replaced["Attention"] == TEXT["num_hidden_layers"]
    assert_close(model(**inputs).logits, logits, atol=2e-5, rtol=1e-5)
    assert torch.equal(model.generate(**inputs, **GREEDILY), answer)
    rows = [text.tolist() for text in texts]
    generator = TokenGenerator(model)
    steps = generator.generate(rows, [GREEDY] * 2, NEW_TOKENS)
    for ours, row, theirs in zip(zip(*steps, strict=True), rows, answers, strict=True):
        assert list(ours) == theirs[0, len(row) :].tolist()
    assert generator.decode_mode != "transformers"
    optimize_kv_cache(model)
    assert torch.equal(model.generate(**inputs, **GREEDILY), answer)
    unpatch(model)
    assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("name", ["Llava", "Gemma3"])
def test_directory(name, tmp_path):
    model, _ = tiny_multimodal(name, torch.device("cpu"))
    tokenizer = tiny_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer("abc", return_tensors="pt").input_ids
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDILY)
    loaded = load_model(tmp_path)
    assert type(loaded.model) is type(model)
    assert loaded.context_length == TEXT["max_position_embeddings"]
    text = InferenceEngine(loaded).infer("abc", NEW_TOKENS, 0.0).text
    assert text == tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
