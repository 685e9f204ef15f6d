"""What tune tries, and the files it reads; measured on a GPU alone."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

pytest.importorskip("triton")

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
