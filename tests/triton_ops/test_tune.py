"""What tune tries, and the files it reads; measured on a GPU alone."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

pytest.importorskip("triton")

from llamatelemetry.cli.main import main
from llamatelemetry.triton_ops import attention, search, tuning
from llamatelemetry.triton_ops.attention import AttentionConfig, attention_config
from llamatelemetry.triton_ops.tuning import LinearConfig, LinearShape, shared_bytes_of


@pytest.mark.without_triton
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(("m", "size"), [(16, 2), (16, 1), (256, 2), (2048, 2), (2048, 1)])
def test_candidates_are_launches(m, tma, size):
    for gated in (False, True):
        shape = LinearShape.of(m, 6144, 4096, gated)
        configs = search.candidates(shape, 132, tma, size)
        assert len(configs) > 8
        assert len(set(configs)) == len(configs)
        for config in configs:
            assert shared_bytes_of(config, shape, size) <= 227 * 1024
            assert config.block_m * config.block_n <= 128 * 32 * config.num_warps
            assert config.tma >= bool(config.stream)
        assert any(c.stream for c in configs) == (tma and m <= 512)
        assert any(c.tma for c in configs) == tma


@pytest.mark.without_triton
def test_shipped_rows_of_prompts_are_configs():
    for path in tuning.FOLDER.glob("*.json"):
        for fields in tuning.prefill_rows(path.read_text(), path.name).values():
            assert asdict(AttentionConfig(**fields)).items() >= fields.items()


@pytest.mark.without_triton
@pytest.mark.parametrize("text", ["[]", '{"prefill": [{}]}', '{"prefill": 3}', "no JSON"])
def test_refuses_other_files(text):
    with pytest.raises(ValueError, match="own: must hold the rows that `llamatelemetry tune`"):
        tuning.prefill_rows(text, "own")


@pytest.mark.without_triton
def test_tuned_rows_are_used(monkeypatch):
    """Of prompts, where few queries do not split their keys."""
    fields = asdict(AttentionConfig(128, 32, 8, 3, tma=True))
    monkeypatch.setattr(attention, "prefill_fields", lambda q: fields)
    q = torch.empty(1, 4, 128, dtype=torch.bfloat16)
    assert attention_config(4096, 8, 4096, q, may_split=False) == AttentionConfig(**fields)
    assert attention_config(128, 1, 4096, q, may_split=True) != AttentionConfig(**fields)


def test_tune_writes_what_it_reads(device, tmp_path):
    """A layer and prompts, once; again, nothing is left to do."""
    if device.type != "cuda":
        pytest.skip("tune measures on a GPU; needs a device")
    path, told = tmp_path / "tuned.json", []
    shape = LinearShape.of(64, 256, 512, False)
    rows = list(search.tune([shape], [64], path, "16-bit", told.append))
    assert [row["us"] > 0 for row in rows] == [True, True]
    text = path.read_text()
    assert isinstance(tuning.table_of(text, "own")[shape, "16-bit"], LinearConfig)
    assert AttentionConfig(**tuning.prefill_rows(text, "own")[64, "16-bit"])
    assert json.loads(text)["measured_on"]["gpu"]
    assert not list(search.tune([shape], [64], path, "16-bit", told.append))
    assert told[-1] == "2 are done, 0 to go"


HOPPER = (9, 0)
LAYER = {"m": 16, "n": 512, "k": 512, "gated": False}
TILE = {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2}


@pytest.mark.without_triton
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"block": 64}, "unexpected keyword argument 'block'"),
        ([["block_m", 64]], "must be a mapping"),
        (TILE | {"tma": 1}, "tma must be of type bool, got 1"),
        (TILE | {"num_warps": "4"}, "num_warps must be of type int, got '4'"),
    ],
)
def test_refuses_configs_of_other_fields(config, said):
    rows = {"linear": [{"shape": LAYER, "dtype": "16-bit", "config": config}]}
    rows["prefill"] = [{"head_dim": 128, "dtype": "16-bit", "config": config}]
    with pytest.raises(ValueError, match=said):
        tuning.prefill_rows(json.dumps(rows), "own")
    if "num_warps" not in said and "tma" not in said:
        with pytest.raises(ValueError, match=said):
            tuning.table_of(json.dumps(rows), "own")


@pytest.fixture
def own_file(monkeypatch, tmp_path):
    """Writes a tuned file that is the only one of a Hopper GPU which is not there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    tables = (tuning._table, tuning._prefill_table)

    def write(**rows):
        for table in tables:
            table.cache_clear()
        path = tmp_path / "own.json"
        path.write_text(json.dumps({"linear": [], "prefill": []} | rows))
        monkeypatch.setattr(tuning, "_files", lambda capability: [path])

    yield write
    for table in tables:
        table.cache_clear()


class _OnGpu:
    """What prefill_fields asks of queries."""

    def __init__(self, dtype, head_dim):
        self.device, self.dtype = torch.device("cuda", 0), dtype
        self.shape = torch.Size([1, 4, head_dim])


@pytest.mark.without_triton
def test_rows_of_prompts_are_found(own_file):
    own_file(prefill=[{"head_dim": 128, "dtype": "16-bit", "config": TILE}])
    fields = tuning.prefill_fields(_OnGpu(torch.bfloat16, 128))
    assert AttentionConfig(**fields) == AttentionConfig(**TILE)
    assert tuning.prefill_fields(_OnGpu(torch.float16, 64)) is None
    assert tuning.prefill_fields(_OnGpu(torch.float32, 128)) is None
    assert tuning.prefill_fields(torch.empty(1, 4, 128, dtype=torch.bfloat16)) is None


@pytest.mark.without_triton
@pytest.mark.parametrize(("m", "kinds"), [(16, ["8-bit", "16-bit"]), (64, ["8-bit"])])
def test_rows_that_serve_bytes(own_file, monkeypatch, m, kinds):
    """Those of 8 bits; of few rows else those of 16 bits, and never the other way round."""
    monkeypatch.setattr(tuning, "shared_bytes_per_program", lambda device: 227 * 1024)
    monkeypatch.setattr(tuning, "num_multiprocessors", lambda device: 132)
    made = {"16-bit": 16, "8-bit": 128}

    def served(dtype, *present):
        shape = LAYER | {"m": m}
        own_file(
            linear=[
                {"shape": shape, "dtype": kind, "config": {"block_n": made[kind], "num_stages": 7}}
                for kind in present
            ]
        )
        found = tuning.linear_config(m, 512, 512, False, dtype, torch.device("cuda", 0))
        return found.block_n if found.num_stages == 7 else None

    byte, half = torch.float8_e4m3fn, torch.float16
    assert served(byte, "8-bit", "16-bit") == made["8-bit"]
    assert served(byte, "16-bit") == (made["16-bit"] if "16-bit" in kinds else None)
    assert served(half, "8-bit", "16-bit") == made["16-bit"]
    assert served(half, "8-bit") is None


@pytest.mark.without_triton
def test_the_command_ends_in_a_sentence(monkeypatch, tmp_path, capsys):
    """Where no launch serves a GPU, as e4m3 on an A100."""

    def tune(*args):
        raise RuntimeError("tune: no launch gives the right result")
        yield

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(search, "tune", tune)
    assert main(["tune", "--prefill", "64", "--out", str(tmp_path / "own.json")]) == 1
    assert capsys.readouterr().err == "llamatelemetry: tune: no launch gives the right result\n"


@pytest.mark.without_triton
def test_progress_is_in_words():
    shape = LinearShape(16, 4096, 14336)
    assert tuning.named((shape, "16-bit")) == "16 rows by 4096 x 14336 in 16-bit"
    assert tuning.named(128) == "prompts of head_dim 128"
