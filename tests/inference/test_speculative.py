"""Speculation: the target's distribution whatever the draft is, its greedy tokens, reuse."""

from __future__ import annotations

import doctest
import itertools
from collections import Counter

import pytest
import torch
import transformers
from drafting import small_llama
from families import tiny_model

from llamatelemetry.inference import speculative
from llamatelemetry.inference.acceptance import accept, probabilities
from llamatelemetry.inference.drafts import CachedModel, PromptLookup
from llamatelemetry.inference.sampling import GREEDY, SamplingParams
from llamatelemetry.inference.speculative import SpeculativeDecoder
from llamatelemetry.models.patching import patch
from llamatelemetry.ops import sample

VOCAB = 5
WARM = SamplingParams(temperature=1.0)
PROMPT = [5, 9, 2, 40, 5, 9, 2]
NEW_TOKENS = 24


def chi_square(counts, expected):
    """The statistic over its degrees of freedom; about 1 for draws from what is expected."""
    cells = [(counts.get(cell, 0), n) for cell, n in expected.items() if n > 0]
    assert sum(seen for seen, _ in cells) == sum(counts.values())  # nothing that cannot be
    return sum((seen - n) ** 2 / n for seen, n in cells) / max(len(cells) - 1, 1)


def adversarial(p):
    """Distributions that put their mass where p has little, and none on p's best."""
    q = (1 / (p + 0.02)) * (p < p.max(-1, keepdim=True).values)
    return q / q.sum(-1, keepdim=True)


@pytest.mark.parametrize("draft", ["adversarial", "uniform", "equal", "certain"])
def test_the_rule_keeps_the_distribution(draft):
    """A Markov chain as the target: three tokens of it, drafted from another distribution."""
    generator = torch.Generator().manual_seed(1)
    p = torch.rand(VOCAB, VOCAB, generator=generator, dtype=torch.double) ** 3
    p[:, 2] = 0  # a token that never comes
    p /= p.sum(-1, keepdim=True)
    q = {
        "adversarial": adversarial(p),
        "uniform": torch.full_like(p, 1 / VOCAB),
        "equal": p,
        "certain": torch.eye(VOCAB, dtype=torch.double)[[1, 3, 0, 2, 4]],
    }[draft]
    draws, counts = 1500, Counter()
    for _ in range(draws):
        tokens = [0]
        while len(tokens) < 4:
            drafted = []
            for _ in range(2):
                last = (tokens + drafted)[-1]
                drafted.append(int(torch.multinomial(q[last], 1, generator=generator)))
            before = [(tokens + drafted)[len(tokens) - 1 + i] for i in range(3)]
            tokens += accept(drafted, q[before[:2]], p[before], generator)
        counts[tuple(tokens[1:4])] += 1
    expected = {
        (a, b, c): float(draws * p[0, a] * p[a, b] * p[b, c])
        for a, b, c in itertools.product(range(VOCAB), repeat=3)
    }
    common = {cell: n for cell, n in expected.items() if n >= 5}
    rare = {cell: n for cell, n in expected.items() if n < 5}
    grouped = Counter({cell: n for cell, n in counts.items() if cell in common})
    grouped["rare"] = sum(n for cell, n in counts.items() if cell in rare)
    assert all(counts.get(cell, 0) == 0 for cell, n in expected.items() if n == 0)
    assert chi_square(grouped, common | {"rare": sum(rare.values())}) < 1.7


@pytest.mark.parametrize("has_draft", [True, False])
def test_models_keep_the_distribution(has_draft):
    target, draft = small_llama(VOCAB, 0.3), small_llama(VOCAB, 0.6)
    params = SamplingParams(temperature=0.9, top_k=4)
    decoder = SpeculativeDecoder(target, draft if has_draft else None, 2, params)
    prompt = [1, 3, 1]
    draws, counts = 300, Counter()
    for _ in range(draws):
        ids = torch.tensor([prompt])
        while ids.shape[1] < len(prompt) + 2:
            ids = decoder.generate_step(ids)
        counts[tuple(ids[0, len(prompt) : len(prompt) + 2].tolist())] += 1
    expected = {}
    first = probabilities(target(torch.tensor([prompt])).logits[:, -1], params)[0]
    for a in range(VOCAB):
        second = probabilities(target(torch.tensor([[*prompt, a]])).logits[:, -1], params)[0]
        expected |= {(a, b): float(draws * first[a] * second[b]) for b in range(VOCAB)}
    assert chi_square(counts, {cell: n for cell, n in expected.items() if n > 1e-9}) < 2.5
    assert 0 < decoder.stats.acceptance_rate < 1


def test_probabilities_are_those_that_sample_draws_from(device):
    logits = torch.randn(1, 8, device=device) * 2
    params = SamplingParams(temperature=0.7, top_k=6, top_p=0.9, min_p=0.02)
    draws = 20000
    columns = [
        torch.full((draws,), value, dtype=dtype, device=device)
        for value, dtype in [
            (params.temperature, torch.float32),
            (params.top_k, torch.int32),
            (params.top_p, torch.float32),
            (params.min_p, torch.float32),
            (params.seed, torch.int64),
        ]
    ]
    offsets = torch.arange(draws, device=device)
    drawn = sample(logits.expand(draws, -1).contiguous(), *columns, offsets)
    expected = draws * probabilities(logits, params)[0]
    counts = Counter(drawn.tolist())
    assert chi_square(counts, {i: float(n) for i, n in enumerate(expected)}) < 3
    rows = torch.tensor([[1.0, 3.0, 3.0], [torch.nan, 0.0, torch.inf], [torch.nan] * 3])
    assert probabilities(rows, GREEDY).argmax(-1).tolist() == [1, 2, 0]
    assert probabilities(rows[1:], WARM).argmax(-1).tolist() == [2, 0]


def greedy_alone(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids], device=model.device)).logits[0, -1].argmax()))
    return ids


def assert_greedy(model, ids):
    """Each token is the best after those before it, or as good as the best."""
    logits = model(torch.tensor([ids], device=model.device)).logits[0]
    for i in range(len(PROMPT), len(ids)):
        assert logits[i - 1].max() - logits[i - 1, ids[i]] < 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "olmo2"])
@pytest.mark.parametrize("kind", ["lookup", "other", "same"])
def test_greedy_tokens_are_the_target_s(device, family, kind):
    target = tiny_model(family, device)
    draft = {"lookup": None, "other": tiny_model(family, device), "same": target}[kind]
    wanted = greedy_alone(target, PROMPT, NEW_TOKENS)
    if family != "olmo2":
        patch(target)
    decoder = SpeculativeDecoder(target, draft, gamma=3)
    ids = decoder.generate(torch.tensor([PROMPT], device=device), NEW_TOKENS)[0].tolist()
    assert len(ids) == len(wanted)
    assert_greedy(target, ids)
    stats = decoder.stats
    assert stats.generated >= NEW_TOKENS
    if kind == "same":
        assert ids == wanted
        assert stats.acceptance_rate > 0.9
        assert stats.steps < NEW_TOKENS / 3


def test_what_is_looked_up():
    lookup = PromptLookup(1)  # of one sequence after the other
    found = [lookup.propose(tokens, 2, GREEDY, None)[0] for tokens in ([5, 5], [5, 5, 8], [7, 8])]
    assert found == [[5, 5], [], []]
    for size, tokens, count, wanted in [
        (3, [1, 2, 3, 4, 1, 2, 3], 2, [4, 1]),
        (2, [1, 2, 9, 2, 7, 1, 2], 3, [9, 2, 7]),  # the longer tail, not the later one
        (1, [1, 2, 9, 2, 7, 1, 2], 3, [7, 1, 2]),
        (3, [1, 2, 3], 2, []),
        (3, [6, 6, 6], 4, [6, 6, 6, 6]),
    ]:
        assert PromptLookup(size).propose(tokens, count, GREEDY, None) == (wanted, None)


class Counted:
    """Counts the tokens that a model runs on."""

    def __init__(self, model):
        self.count = 0
        model.register_forward_pre_hook(self._seen, with_kwargs=True)

    def _seen(self, module, args, kwargs):
        self.count += kwargs["input_ids"].shape[1]


def test_only_what_is_new_is_computed(device):
    model = tiny_model("llama", device)
    seen = Counted(model)
    cached = CachedModel(model)
    tokens = list(range(1, 31))
    whole = cached.logits(tokens, 1)
    for changed, computed in [
        ([*tokens, 31, 32], 2),
        ([*tokens, 31, 33, 34], 2),  # the last two of three
        (tokens[:10], 1),  # cropped, but for the token whose logits are asked for
        (tokens, 20),
        ([7, *tokens], 31),
    ]:
        before = seen.count
        logits = cached.logits(changed, 1)
        assert seen.count - before == computed
        assert cached.num_cached == len(changed)
        alone = model(input_ids=torch.tensor([changed], device=device)).logits[0, -1:]
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cached.logits(tokens, 1), whole, rtol=1e-4, atol=1e-4)


def test_a_forward_that_fails_leaves_it_usable(device):
    model = tiny_model("llama", device)
    decoder = SpeculativeDecoder(model, gamma=2)
    ids = torch.tensor([PROMPT], device=device)
    wanted = decoder.generate(ids, 12)

    def fails(module, args, output):
        raise RuntimeError("in the middle")

    hook = model.model.layers[1].register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        decoder.generate_step(wanted)
    hook.remove()
    assert torch.equal(decoder.generate(ids, 12), wanted)


def test_seeds_ends_and_shapes(device):
    target, draft = tiny_model("llama", device), tiny_model("llama", device)
    warm = SamplingParams(temperature=1.5, seed=3)
    decoder = SpeculativeDecoder(target, draft, 4, warm)
    ids = torch.tensor(PROMPT, device=device)
    first = decoder.generate(ids, 12)
    assert first.shape == (len(PROMPT) + 12,)
    assert torch.equal(decoder.generate(ids, 12), first)
    other = SpeculativeDecoder(target, draft, 4, SamplingParams(temperature=1.5, seed=4))
    assert not torch.equal(other.generate(ids, 12), first)
    end = int(first[len(PROMPT) + 3])
    ended = decoder.generate(ids, 12, eos_token_ids=[end]).tolist()
    assert ended == first.tolist()[: first.tolist().index(end, len(PROMPT)) + 1]
    stepped = decoder.generate_step(ids[None])
    assert stepped.shape[0] == 1
    assert len(PROMPT) < stepped.shape[1] <= len(PROMPT) + 5
    nearly_full = torch.ones(1, 127, dtype=torch.int64, device=device)
    for _ in range(8):  # one token is drafted: its forward runs on the context's 128 tokens
        assert decoder.generate_step(nearly_full).shape[1] in (128, 129)


def test_refusals():
    model = small_llama(VOCAB, 1.0)
    ids = torch.tensor([[1, 2]])
    for make, sentence in [
        (lambda: SpeculativeDecoder(model, gamma=0), "gamma must be at least 1, got 0"),
        (lambda: SpeculativeDecoder(model, gamma=1.5), "gamma must be a whole number, got 1.5"),
        (lambda: SpeculativeDecoder(model, max_ngram=0), "max_ngram must be at least 1, got 0"),
        (
            lambda: SpeculativeDecoder(model, tiny_model("llama")),
            "target's vocabulary of 5 tokens, got 97",
        ),
    ]:
        with pytest.raises(ValueError, match=sentence):
            make()
    decoder = SpeculativeDecoder(model)
    for given, sentence in [
        (torch.ones(2, 3, dtype=torch.int64), r"shape \[1, seqlen\].*got torch.int64 \(2, 3\)"),
        (torch.ones(1, 0, dtype=torch.int64), r"got torch.int64 \(1, 0\)"),
        (torch.ones(1, 3), r"got torch.float32 \(1, 3\)"),
        (torch.ones(1, 64, dtype=torch.int64), "fewer than the target's context of 64 tokens"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            decoder.generate_step(given)
    with pytest.raises(
        ValueError, match=r"must fit the target's context of 64 tokens, got 2 \+ 63"
    ):
        decoder.generate(ids, 63)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        decoder.generate(ids, 0)
    config = transformers.MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1)
    with pytest.raises(ValueError, match="whose cache can be cut back, got MambaForCausalLM"):
        SpeculativeDecoder(transformers.MambaForCausalLM(config))


def test_examples():
    found = doctest.testmod(speculative)
    assert found.failed == 0
    assert found.attempted >= 7
