"""Drafts for tests and batches that get them: right but for a few tokens, or never right."""

from __future__ import annotations

import torch
import transformers
from batching import COUNTS, PROMPTS, WARM, is_free

from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.ngrams import NgramIndex
from llamatelemetry.inference.sampling import GREEDY, SamplingParams
from llamatelemetry.inference.speculation_config import SpeculationConfig

SPECULATION = SpeculationConfig(prompt_lookup_min=1, adaptive=False)
PARAMS = [GREEDY, WARM, GREEDY, SamplingParams(temperature=0.7, top_k=9, top_p=0.9), WARM]


def draft_from(monkeypatch, texts, wrong_each=3):
    """Has requests drafted from the text that is theirs, prompt and answer, of texts.

    Args:
        wrong_each: each so many-th token of a text is drafted wrongly; 1 drafts no right one.
    """

    def propose(self, tokens, count):
        for text in texts:
            if list(tokens) == text[: len(tokens)]:
                found = range(len(tokens), min(len(tokens) + count, len(text)))
                return [abs(text[at] - (at % wrong_each == 0)) for at in found]
        return [1] * count

    monkeypatch.setattr(NgramIndex, "propose", propose)


def served(model, speculation, each=None, **options):
    """Results of all prompts, which come at once; keywords of each by each."""
    batcher = ContinuousBatching(4, model, speculation=speculation, **options)
    batcher._batch.scheduler.expected_share = 0.0  # overcommits, so that some are preempted
    handles = [
        batcher.submit(prompt, params, count + 12, **(each[i] if each else {}))
        for i, (prompt, params, count) in enumerate(zip(PROMPTS, PARAMS, COUNTS, strict=True))
    ]
    steps = 0
    while batcher.active_requests:
        assert len(set(found := batcher.step())) == len(found)
        batcher._batch.scheduler.check()
        steps += 1
    assert is_free(batcher)
    return handles, steps, batcher


def tokens_of(handles):
    return [(handle.token_ids, handle.request.finish_reason) for handle in handles]


def texts_of(handles):
    return [[*prompt, *handle.token_ids] for prompt, handle in zip(PROMPTS, handles, strict=True)]


def small_llama(vocab_size, scale):
    """A random model of a small vocabulary; larger scales make its distributions sharper."""
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=None,
        pad_token_id=None,
        bos_token_id=None,
    )
    with torch.inference_mode(False), torch.no_grad():
        model = transformers.LlamaForCausalLM(config).eval()
        model.lm_head.weight.normal_(std=scale)
        return model
