"""sample: values, refusals, opcheck, reference (transformers, torch), replay; compile."""

from __future__ import annotations

import functools

import pytest
import torch
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck
from torch import Tensor

from llamatelemetry.ops import reference, sample

FILTERS = [
    {},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 1500},
    {"top_p": 0.9},
    {"top_p": 0.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 0.8, "top_k": 2000, "top_p": 0.8},
    {"temperature": 2.0, "top_p": 0.999, "min_p": 1e-4},
    {"temperature": 0.01, "top_k": 2000, "min_p": 0.3},
]
DTYPES = {"top_k": torch.int32, "seed": torch.int64, "offset": torch.int64}


def columns(batch: int, device: torch.device | str = "cpu", **values: object) -> list[Tensor]:
    """The arguments of sample after logits; each value is one for all rows or one a row."""
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "offset": 0}
    return [
        torch.as_tensor(values.get(name, default))
        .to(DTYPES.get(name, torch.float32), copy=True)
        .expand(batch)
        .contiguous()
        .to(device)
        for name, default in defaults.items()
    ]


def draws(row: Tensor, count: int, **values: object) -> Tensor:
    """count tokens of one row of logits, each at another offset."""
    parameters = columns(count, row.device, offset=torch.arange(count), **values)
    return sample(row.expand(count, -1), *parameters)


@pytest.mark.parametrize("vocab_size", [1, 63, 1000, 20011])
@pytest.mark.parametrize("values", FILTERS, ids=str)
def test_values(device, dtype, vocab_size, values):
    # The token's share of the cumulative distribution holds the random number, up to rounding.
    logits = (4 * torch.randn(2, vocab_size, device=device)).to(dtype)
    parameters = columns(2, device, seed=[2**62, -5], offset=[7, 2**40], **values)
    tokens = sample(logits, *parameters)
    assert tokens.dtype == torch.int64
    for row, token, seed, offset in zip(
        logits.double(),
        tokens.tolist(),
        parameters[4].tolist(),
        parameters[5].tolist(),
        strict=True,
    ):
        words = [x >> shift & 2**32 - 1 for x in (offset, seed) for shift in (0, 32)]
        random = reference.philox4x32([*words[:2], 0, 0], words[2:])
        uniform = (random[1] * 2**32 + random[0]) / 2**64
        filters = [float(p[0]) for p in parameters[:4]]
        probs = reference.sampling_probabilities(row, filters[0], int(filters[1]), *filters[2:])
        cumulative = probs.cumsum(0)
        assert probs[token] > 0
        assert cumulative[token] - probs[token] - 1e-6 <= uniform <= cumulative[token] + 1e-6


def test_philox_known_answers():
    # The vectors of Random123's kat_vectors for philox4x32 with 10 rounds.
    assert reference.philox4x32([0] * 4, [0] * 2) == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]
    assert reference.philox4x32(
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    ) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_greedy(device, dtype):
    logits = torch.randn(5, 3001, device=device).to(dtype)
    logits[1, 77] = logits[1, 2900] = 9.0  # equal maxima
    logits[2, 3000] = 9.0
    logits[3, 5] = torch.inf
    logits[4] = 0
    greedy = columns(5, device, temperature=[0.0, 0.0, -1.0, torch.nan, 0.0], top_k=7, top_p=0.5)
    assert sample(logits, *greedy).tolist() == [int(logits[0].argmax()), 77, 3000, 5, 0]


def test_rows_without_a_distribution(device, dtype):
    nan, inf = torch.nan, torch.inf
    logits = torch.randn(8, 200, device=device).to(dtype)
    alone = sample(logits, *columns(8, device, seed=range(8)))
    logits[1] = nan
    logits[2] = -inf
    logits[3, 50] = inf
    logits[4, :150] = nan
    logits[5, 10] = nan
    logits[5, 11:] = -inf
    logits[6, 3:] = nan
    logits[6, :3] = -inf
    for values in ({}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.0}):
        tokens = sample(logits, *columns(8, device, seed=range(8), **values)).tolist()
        assert tokens[1:4] == [0, 0, 50]
        assert 150 <= tokens[4] < 200
        assert 0 <= tokens[5] < 10
        assert tokens[6] == 0
        assert (
            tokens
            == reference.sample(
                logits.double(), *columns(8, device, seed=range(8), **values)
            ).tolist()
        )
    tokens = sample(logits, *columns(8, device, seed=range(8)))
    assert tokens[[0, 7]].tolist() == alone[[0, 7]].tolist(), "a NaN row changed another"


def test_absurd_parameters_give_valid_tokens(device):
    absurd = [torch.nan, torch.inf, -torch.inf, 1e-45, 1e30, 0.5]
    for name in ("temperature", "top_p", "min_p"):
        tokens = sample(torch.randn(6, 99, device=device), *columns(6, device, **{name: absurd}))
        assert ((tokens >= 0) & (tokens < 99)).all()
    ks = [-(2**31), -1, 0, 98, 99, 2**31 - 1]
    tokens = sample(torch.randn(6, 99, device=device), *columns(6, device, top_k=ks))
    assert ((tokens >= 0) & (tokens < 99)).all()


def test_a_row_depends_on_itself_alone(device, dtype):
    logits = torch.randn(6, 5000, device=device).to(dtype)
    many = columns(
        6, device, seed=range(6), offset=3, top_k=[0, 9, 0, 0, 0, 9], top_p=[1, 1, 0.5] * 2
    )
    tokens = sample(logits, *many)
    assert torch.equal(tokens, sample(logits, *many)), "not deterministic"
    order = torch.tensor([3, 0, 5, 2], device=device)
    assert torch.equal(tokens[order], sample(logits[order], *(x[order] for x in many)))
    scattered = torch.full((6, 7001), torch.nan, dtype=dtype, device=device)[:, 1001:6001]
    scattered.copy_(logits)
    assert torch.equal(tokens, sample(scattered, *many)), "row stride or offset matters"


def test_refusals(device):
    logits = torch.randn(2, 8, device=device)

    def refuses(*parts, logits=logits, index=0, value=None):
        args = columns(2, device)
        args[index] = args[index] if value is None else value(args[index])
        assert_refuses(lambda: sample(logits, *args), "sample: ", *parts)

    refuses("logits must be [batch, vocab_size], got shape [8]", logits=logits[0])
    refuses("logits must be float32, float16 or bfloat16, got float64", logits=logits.double())
    refuses("logits must have a contiguous last dimension", logits=logits.T)
    refuses("logits must have a vocab_size of 1 to 4194304, got 0", logits=logits[:, :0])
    names = ["temperature", "top_k", "top_p", "min_p", "seed", "offset"]
    kinds = ["float32", "int32", "float32", "float32", "int64", "int64"]
    for index, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        refuses(f"{name} must be [batch] = [2], got shape [1]", index=index, value=lambda x: x[1:])
        refuses(f"{name} must be {kind}, got float16", index=index, value=lambda x: x.half())
        refuses(f"{name} must be contiguous", index=index, value=lambda x: x[:1].expand(2))
    with torch.inference_mode(False), torch.enable_grad():
        refuses("logits must not require grad", logits=torch.ones(2, 8, requires_grad=True))


def test_opcheck(device, dtype):
    logits = torch.randn(3, 100, device=device).to(dtype)
    run_opcheck("sample", logits, *columns(3, device, top_k=5, top_p=0.9))
    run_opcheck("sample", logits[:0], *columns(0, device))


@pytest.mark.parametrize("case", range(12))
def test_support_is_that_of_transformers_warpers(device, case, monkeypatch):
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process

    # torch.sort is free to order equal logits as it likes; ours is the stable order.
    monkeypatch.setattr(torch, "sort", functools.partial(torch.sort, stable=True))
    torch.manual_seed(case)
    row = torch.randn(40)
    if case % 2:
        row = (row * 3).round() / 3  # many equal logits
    values = {
        "temperature": [0.7, 1.0, 1.8][case % 3],
        "top_k": [0, 7, 25][case // 2 % 3],
        "top_p": [1.0, 0.8, 0.35][case % 3],
        "min_p": [0.0, 0.3][case // 3 % 2],
    }
    warpers = LogitsProcessorList([logits_process.TemperatureLogitsWarper(values["temperature"])])
    if values["top_k"]:
        warpers.append(logits_process.TopKLogitsWarper(values["top_k"]))
    if values["top_p"] < 1:
        warpers.append(logits_process.TopPLogitsWarper(values["top_p"]))
    warpers.append(logits_process.MinPLogitsWarper(values["min_p"]))
    allowed = warpers(torch.zeros(1, 1, dtype=torch.int64), row.double()[None]).isfinite()[0]
    drawn = torch.zeros(40, dtype=torch.bool)
    drawn[draws(row.to(device), 20_000, seed=case, **values).cpu()] = True
    assert drawn.nonzero().flatten().tolist() == allowed.nonzero().flatten().tolist()


@pytest.mark.parametrize("top_p", [i / 10 for i in range(1, 10)])
def test_top_p_among_equals_is_that_of_transformers(device, top_p):
    # Ten equal tokens: 1 - top_p of them go, the lowest ids first.
    drawn = draws(torch.zeros(10, device=device), 2000, top_p=top_p).unique()
    assert drawn.tolist() == list(range(round(10 * (1 - top_p)), 10))


def chi_square_excess(counts: Tensor, probs: Tensor) -> float:
    """Standard deviations by which Pearson's statistic exceeds its mean."""
    expected = probs * counts.sum()
    freedom = len(probs) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    "values", [{}, {"temperature": 1.7}, {"top_k": 20}, {"top_p": 0.8}], ids=str
)
def test_distribution(device, values):
    row = torch.randn(60)
    filters = [
        values.get("temperature", 1.0),
        values.get("top_k", 0),
        values.get("top_p", 1.0),
        0.0,
    ]
    probs = reference.sampling_probabilities(row.double(), *filters)
    counts = draws(row.to(device), 40_000, seed=11, **values).cpu().bincount(minlength=60)
    kept = probs > 0
    assert counts[~kept].sum() == 0
    assert chi_square_excess(counts[kept], probs[kept]) < 5
    skewed = probs[kept] * torch.linspace(0.9, 1.1, int(kept.sum()))
    assert chi_square_excess(counts[kept], skewed / skewed.sum()) > 5, "this test cannot fail"


def test_draws_of_seeds_and_offsets_are_independent(device):
    # Neighbouring seeds and offsets must not correlate: pairs of two coins, four equal cells.
    coin = torch.zeros(4000, 2, device=device)
    numbers = torch.arange(4000)
    for one, other in [
        (columns(4000, device, offset=numbers), columns(4000, device, offset=numbers + 1)),
        (columns(4000, device, seed=numbers), columns(4000, device, seed=numbers + 1)),
        (columns(4000, device, seed=numbers), columns(4000, device, offset=numbers)),
    ]:
        cells = (sample(coin, *one) * 2 + sample(coin, *other)).cpu().bincount(minlength=4)
        assert chi_square_excess(cells, torch.full((4,), 0.25)) < 5


def test_replay(device, dtype):
    def case(offset):
        logits = torch.randn(4, 3000, device=device).to(dtype)
        mixed = {"temperature": [0, 1, 0.8, 1.2], "top_k": [0, 0, 40, 0], "top_p": [1, 1, 0.9, 0.9]}
        if offset:
            mixed = {name: row[::-1] for name, row in mixed.items()}
        return logits, *columns(4, device, seed=range(4), offset=offset, **mixed)

    assert_replays(sample, case(0), case(9))


def test_compile(device):
    def case(batch, vocab_size):
        return torch.randn(batch, vocab_size, device=device), *columns(batch, device, top_k=5)

    assert_compiles(sample, [case(3, 100), case(5, 301), case(9, 77)])
