"""Directories of quantised weights that are not read, and fields that tell how they are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_model
from quantised_directories import KINDS, Kind, linears_of, write_quantised
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig

from llamatelemetry.loading.find import ModelFileError, load_model
from llamatelemetry.loading.quantised import build_quantised
from llamatelemetry.quantization.checkpoints import load_linear
from llamatelemetry.quantization.groups import pack_groups, unpack_groups
from llamatelemetry.quantization.layouts import layout_of

GPTQ = {"quant_method": "gptq", "bits": 4}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4}}},
}
BLOCKS = {"num_bits": 8, "strategy": "block", "block_structure": [64, 32]}
BYTES = {"quant_method": "compressed-tensors", "format": "int-quantized"}


def edited(path: Path, edit) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def refusal(path: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["format", "checkpoint_format"])
def test_version_of_gptq(name):
    """Either field, in any case, as transformers' GPTQConfig reads them."""
    assert layout_of(GPTQ).zero_added == 1
    assert layout_of(GPTQ | {name: "GPTQ"}).zero_added == 1
    assert layout_of(GPTQ | {name: "GPTQ_V2"}).zero_added == 0
    assert layout_of(GPTQ | {"format": "gptq", "checkpoint_format": "gptq_v2"}).zero_added == 0


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (GPTQ | {"checkpoint_format": "marlin"}, "must be gptq or gptq_v2, got marlin"),
        (GPTQ | {"format": "bitblas"}, "must be gptq or gptq_v2, got bitblas"),
        ({"quant_method": "awq", "bits": 4, "format": "GEMV"}, "must be gemm, got gemv"),
        ({"quant_method": "fp8", "weight_block_size": 32}, "must be two sizes, got 32"),
        ({"quant_method": "fp8", "weight_block_size": []}, r"must be two sizes, got \[\]"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, "must be of sizes from 1"),
        (PACKED | {"config_groups": [{}]}, r"must be groups by name, .* got \[{}\]"),
        (PACKED | {"config_groups": {"a": "x"}}, "must be groups by name"),
        (PACKED | {"config_groups": {"a": {"weights": 4}}}, "must be groups by name"),
        (PACKED | {"config_groups": {"a": {"weights": {"num_bits": [4]}}}}, r"got \[4\]"),
        (BYTES | {"config_groups": {"a": {"weights": {"strategy": "block"}}}}, "two sizes"),
        (
            BYTES | {"config_groups": {"a": {"weights": BLOCKS}, "b": {"weights": {}}}},
            "must have one block_structure",
        ),
    ],
)
def test_config_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        layout_of(fields)


E4M3 = torch.zeros(96, 64).to(torch.float8_e4m3fn)
WORDS = torch.zeros(64, 8, dtype=torch.int32)
FLOAT8 = {"quant_method": "fp8", "weight_block_size": [64, 32]}


@pytest.mark.parametrize(
    ("fields", "tensors", "sentence"),
    [
        *(
            (FLOAT8, {"weight": E4M3, "weight_scale_inv": torch.ones(shape)}, r"must be \(2, 2\)")
            for shape in [(2, 1), (2, 4), (5, 2), (2, 0), (96,), (2,), (1,)]
        ),
        *(
            (
                {"quant_method": "fp8"},
                {"weight": E4M3, "weight_scale": torch.ones(shape)},
                r"weight_scale must be \[96, groups\] or a single one",
            )
            for shape in [(96,), (2, 2), (96, 0)]
        ),
        (
            BYTES,
            {
                "weight": torch.zeros(8, 64, dtype=torch.int8),
                "weight_scale": torch.ones(8, 1),
                "weight_zero_point": torch.ones(8, 1, dtype=torch.int8),
            },
            "weight_zero_point must be zero",
        ),
        (
            GPTQ,
            {"qweight": WORDS, "qzeros": WORDS, "scales": torch.ones(8)},
            "scales must be two-dimensional",
        ),
        (
            PACKED,
            {
                "weight_packed": WORDS,
                "weight_scale": torch.ones(3, 2),
                "weight_shape": torch.tensor([64, 64]),
            },
            r"weight_scale must be \[64, groups\]",
        ),
        (
            PACKED,
            {
                "weight_packed": WORDS,
                "weight_scale": torch.ones(1),
                "weight_shape": torch.tensor([64]),
            },
            "weight_shape must be two sizes",
        ),
    ],
)
def test_tensors_refused(fields, tensors, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_linear(layout_of(fields), tensors)


def test_one_scale_of_packed_codes():
    words = torch.randint(2**31 - 1, (32, 8), dtype=torch.int32)
    each = {"weight_packed": words, "weight_shape": torch.tensor([32, 64])}
    layout = layout_of(PACKED)
    one, _, _ = load_linear(layout, each | {"weight_scale": torch.tensor([0.5])})
    rows, _, _ = load_linear(layout, each | {"weight_scale": torch.full((32, 1), 0.5)})
    assert torch.equal(unpack_groups(one, 32, 64), unpack_groups(rows, 32, 64))


def test_blocks_of_compressed_tensors():
    codes = torch.randn(96, 64).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 2)
    groups = {"config_groups": {"group_0": {"weights": BLOCKS}}}
    layout = layout_of(BYTES | groups | {"format": "float-quantized"})
    found = {"weight": codes, "weight_scale": scales}
    weight, _, _ = load_linear(layout, found)
    each = scales.repeat_interleave(64, 0)[:96].repeat_interleave(32, 1)
    assert torch.equal(unpack_groups(weight, 96, 64), codes.float() * each)
    zero = {"weight_zero_point": torch.zeros(2, 2)}
    again, _, _ = load_linear(layout, found | zero)
    assert torch.equal(again.scales, weight.scales)


def test_either_name_of_a_scale(tmp_path):
    """AutoFP8's directories say weight_scale where others say weight_scale_inv."""
    theirs = write_quantised(tmp_path, tiny_model("llama"), KINDS["float8-tensor"])

    def rename(tensors):
        for name, _ in linears_of(theirs):
            scale = tensors.pop(f"{name}.weight_scale_inv").reshape(())
            tensors |= {f"{name}.weight_scale": scale, f"{name}.input_scale": torch.ones(())}

    edited(tmp_path, rename)
    model = load_model(tmp_path, dtype=torch.float32, exact=True).model
    name, linear = next(linears_of(theirs))
    assert torch.equal(model.get_submodule(name).dense(torch.float32).weight, linear.weight)


def test_tensors_that_are_not_read(tmp_path):
    write_quantised(tmp_path, tiny_model("llama"), Kind("gptq"))
    attention = "model.layers.0.self_attn"
    nothing_lost = {
        f"{attention}.rotary_emb.inv_freq": torch.ones(4),
        f"{attention}.k_scale": torch.ones(1),
        f"{attention}.q_proj.input_global_scale": torch.ones(1),
        "model.layers.0.mlp.extra.bias": torch.zeros(4),
    }
    edited(tmp_path, lambda tensors: tensors.update(nothing_lost))
    load_model(tmp_path)
    for name, sentence in [
        ("model.layers.0.mlp.act.scales", "is no part of the llama that config.json describes"),
        ("model.layers.0.mlp.extra.bias", "is no part of the llama"),
        ("model.layers.0.mlp.experts.0.w1.weight", "each routed expert must have gate, up"),
        ("model.layers.0.mlp.experts.0.w1.qweight", "each routed expert must have gate, up"),
    ]:
        edited(tmp_path, lambda tensors, name=name: tensors.update({name: torch.ones(4)}))
        assert name.removesuffix(".qweight") in (words := refusal(tmp_path))
        assert sentence in words
        edited(tmp_path, lambda tensors, name=name: tensors.pop(name))


def test_not_of_text_alone(tmp_path):
    with pytest.raises(ModelFileError, match="of text models alone, got transformers' qwen2_5_vl"):
        build_quantised(
            tmp_path, Qwen2_5_VLConfig(), GPTQ, torch.float32, torch.device("cpu"), False
        )


def test_zeros_refused():
    codes, scales = torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2)
    zeros = torch.full((4, 2), 15, dtype=torch.uint8)
    assert pack_groups(codes, "U4", scales, zeros).zeros is not None
    for wrong, sentence in [
        (zeros + 1, "zeros must be 0 to 15, got 16"),
        (zeros.float(), r"zeros must be uint8 \(4, 2\) as the scales, got torch.float32"),
        (zeros[:, :1], r"as the scales, got torch.uint8 of \(4, 1\)"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            pack_groups(codes, "U4", scales, wrong)
    with pytest.raises(ValueError, match=r"codes must be \[n, k\]"):
        pack_groups(codes[0], "U4", scales, zeros)
