"""The table of docs/models.md is what its script gives; a packed model's text is transformers'."""

from __future__ import annotations

import re

import pytest
import reach
import torch
import transformers
from families import FAMILIES, VOCAB, tiny_model

from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.models.patching import patch

SAMPLE = {
    "whole": ["Gemma2ForCausalLM", "Glm4MoeForCausalLM", "OPTForCausalLM"],
    "in part": ["DeepseekV3ForCausalLM", "PersimmonForCausalLM"],
    "attention only": ["BartForCausalLM", "BigBirdPegasusForCausalLM"],
    "not": ["BloomForCausalLM"],
}
NEW_TOKENS = 12
NEEDS_NEMOTRON = pytest.mark.skipif("nemotron" not in FAMILIES, reason="families.py says why")


def documented():
    """Kind of each class in the document."""
    text = reach.DOCUMENT.read_text().partition(reach.BEGIN)[2].partition(reach.END)[0]
    found = {}
    for kind, names in re.findall(r"\*\*([\w ]+)\*\*: ([^*]*)\.", text):
        found |= dict.fromkeys(re.split(r",\s+", names.strip()), kind)
    return found


@pytest.mark.skipif(
    f"transformers {transformers.__version__}:" not in reach.DOCUMENT.read_text(),
    reason="the table is of another transformers",
)
def test_the_table_is_what_the_script_gives():
    names = [name for sample in SAMPLE.values() for name in sample]
    with torch.inference_mode(False):
        results = list(reach.results(names))
    assert {result.name: result.kind for result in results} == {
        name: kind for kind, sample in SAMPLE.items() for name in sample
    }
    found = documented()
    for result in results:
        assert found[reach.short(result.name)] == result.kind


def test_the_table_has_no_wrong_and_enough_of_the_rest():
    kinds = list(documented().values())
    assert "wrong" not in kinds
    assert sum(kind in ("whole", "in part") for kind in kinds) >= 60


@pytest.mark.parametrize(
    "family",
    [
        "gemma",
        "gemma2",
        "gemma3",
        "vaultgemma",
        "phi3_partial",
        "smollm3",
        "olmo2",
        "olmo3",
        "exaone4",
        "glm4",
        "helium",
        "ernie",
        "hunyuan",
        "cohere2",
        "stablelm",
        "starcoder2",
        "phi",
        "gpt2",
        "gpt_neox",
        "opt",
        "qwen3_moe",
        "gpt_oss",
        "glm",
        "seed_oss",
        "ministral",
        "cwm",
        "arcee",
        "cohere",
        pytest.param("nemotron", marks=NEEDS_NEMOTRON),
        "mixtral",
        "qwen2_moe",
        "olmoe",
        "granitemoe",
        "biogpt",
        "hyperclovax",
    ],
)
def test_packed_generation_is_that_of_transformers(family, device):
    model = tiny_model(family, device)
    prompts = [torch.randint(VOCAB, (n,), device=device) for n in (1, 9)]
    theirs, margins = [], []
    for prompt in prompts:
        out = model.generate(
            prompt[None],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=0,
        )
        best = torch.stack(out.logits, 1).topk(2).values[0]
        theirs.append(out.sequences[0, len(prompt) :].tolist())
        margins.append((best[:, 0] - best[:, 1]).tolist())
    assert patch(model).not_packed is None
    rows = [prompt.tolist() for prompt in prompts]
    steps = TokenGenerator(model).generate(rows, [GREEDY] * len(rows), NEW_TOKENS)
    for ours, want, margin in zip(zip(*steps, strict=True), theirs, margins, strict=True):
        differs = [i for i in range(NEW_TOKENS) if ours[i] != want[i]]
        assert not differs or margin[differs[0]] < 1e-3
