"""optimize_for_tensor_cores: what is decided, and float16 that does not overflow.

Deciding and doing are apart, so that the CPU runs all but the question whether there is a GPU.
"""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from families import VOCAB, tiny_model
from overflow_models import BUILDS, OVERFLOWS, wide_embeddings
from torch import nn

from llamatelemetry.cuda import fp16_safety, optimize_for_tensor_cores
from llamatelemetry.cuda.fp16_safety import LIMIT, Fp16Plan, Range, plan_for
from llamatelemetry.cuda.optimize import OptimizationPlan, apply_plan, plan_optimization
from llamatelemetry.models.patching import patch, unpatch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _parameters_are_normal_tensors(set_threads):
    set_threads(1)
    with torch.inference_mode(False), torch.no_grad():
        yield


def logits_of(model, ids):
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("case", OVERFLOWS)
def test_float16_does_not_overflow(case):
    """Logits were all NaN: the commonest complaint on cards without bfloat16."""
    make, scaled = OVERFLOWS[case]
    model, ids = make(), torch.randint(VOCAB, (2, 11))
    expected = logits_of(model, ids)
    assert not logits_of(copy.deepcopy(model).half(), ids).isfinite().all(), "nothing to mend"
    tokens = model.generate(ids[:1], max_new_tokens=6, do_sample=False)

    plan = plan_optimization(model, torch.float16, (7, 5))
    apply_plan(model, plan, CPU)
    logits = logits_of(model, ids).float()
    assert (logits - expected).abs().max() <= 0.01 * expected.abs().max()
    assert torch.equal(model.generate(ids[:1], max_new_tokens=6, do_sample=False), tokens)
    notice = "; ".join(plan.notes)
    assert "residual in float32" in notice
    assert scaled in notice
    assert "no fused ops" in notice
    products = [m for m in model.modules() if fp16_safety.is_product(m)]
    assert all(m.weight.dtype == torch.float16 for m in products)


@pytest.mark.parametrize("build", BUILDS)
def test_the_residual_is_widened_in_every_architecture(build):
    """Experts, fused projections, encoders, cross attention, attention apart from its output."""
    model, ids = wide_embeddings(build), torch.randint(1, VOCAB, (2, 9))
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    expected = model(**inputs)[0]
    plan = plan_optimization(model, torch.float16, (7, 5))
    assert apply_plan(model, plan, CPU).hooks, plan.notes
    error = (model(**inputs)[0].float() - expected).abs().max()
    assert error <= 0.01 * expected.abs().max()


def test_a_model_in_range_stays_plain_float16_with_our_ops():
    model, ids = tiny_model("llama"), torch.randint(VOCAB, (2, 11))
    expected = logits_of(model, ids)
    plan = plan_optimization(model, torch.float16, (7, 5))
    guard = apply_plan(model, plan, CPU)
    assert not guard.hooks
    assert not guard.replaced
    assert "fused ops for 2 Attention" in "; ".join(plan.notes)
    logits = logits_of(model, ids)
    assert logits.dtype == torch.float16
    assert (logits.float() - expected).abs().max() <= 0.01 * expected.abs().max()
    assert patch(model).replaced["Attention"] == 2
    unpatch(model)


def test_a_mask_is_no_overflow():
    model = tiny_model("llama")
    model.set_attn_implementation("eager")  # its masks hold the least float16
    ids = torch.randint(VOCAB, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    assert not plan_for(fp16_safety.probe(model.half(), inputs))


def test_a_patched_model_is_probed_below_our_ops():
    model, ids = OVERFLOWS["residual"][0](), torch.randint(VOCAB, (2, 11))
    expected = logits_of(model, ids)
    patch(model)
    apply_plan(model, plan_optimization(model, torch.float16, (7, 5)), CPU)
    logits = logits_of(model, ids).float()
    assert (logits - expected).abs().max() <= 0.01 * expected.abs().max()


def test_the_guard_comes_out_again_and_follows_a_copy():
    model, ids = OVERFLOWS["residual"][0]().half(), torch.randint(VOCAB, (1, 5))
    found = plan_for(fp16_safety.probe(model, {"input_ids": ids, "use_cache": False}))
    guard = fp16_safety.apply(model, found)
    twin = copy.deepcopy(model)
    for layer in twin.model.layers:
        layer.mlp.down_proj.weight.zero_()
        layer.self_attn.o_proj.weight.zero_()
    bare = logits_of(twin, ids)
    assert bare.isfinite().all()
    assert not torch.allclose(bare, logits_of(model, ids))
    guard.remove()
    assert not logits_of(model, ids).isfinite().all()
    assert not any("forward" in m.__dict__ or m._forward_hooks for m in model.modules())


def test_the_probe_leaves_the_model_as_it_was():
    model = tiny_model("llama").half()
    ids = torch.randint(VOCAB, (1, 5))
    before = logits_of(model, ids)
    ranges = fp16_safety.probe(model, fp16_safety.calibration_inputs(model))
    assert torch.equal(logits_of(model, ids), before)
    products = [name for name, r in ranges.items() if r.is_product]
    assert products[0] == "model.layers.0.self_attn.q_proj"
    assert products[-1] == "lm_head"
    assert all(0 < r.output < 100 for r in ranges.values())


def test_the_probe_looks_at_every_part_of_the_vocabulary():
    model = tiny_model("llama")
    model.config.bos_token_id = 7
    inputs = fp16_safety.calibration_inputs(model)
    ids = inputs["input_ids"][0].tolist()
    assert ids[0] == 7
    assert len(set(ids)) == 32
    assert max(ids) > 0.6 * VOCAB
    assert inputs["use_cache"] is False
    with pytest.raises(ValueError, match="got Linear; pass calibration inputs"):
        fp16_safety.calibration_inputs(nn.Linear(2, 2))


def mlp_ranges(**changes):
    ranges = {
        "norm": Range(False, 1, 1),
        "0.mlp.gate": Range(True, 1, 1),
        "0.mlp.up": Range(True, 1, 1),
        "0.mlp.down": Range(True, 1, 1),
        "head": Range(True, 1, 1),
    }
    return ranges | {name.replace("__", "."): value for name, value in changes.items()}


def test_plan():
    assert not plan_for(mlp_ranges())
    assert not plan_for(mlp_ranges(norm=Range(False, LIMIT, LIMIT)))
    residual = plan_for(mlp_ranges(norm=Range(False, LIMIT * 2, 1)))
    assert residual == Fp16Plan(frozenset(), frozenset({"0.mlp.down", "head"}), ("norm", LIMIT * 2))
    product = plan_for(mlp_ranges(**{"0.mlp.down": Range(True, LIMIT * 2, 1)}))
    assert product.scaled == {"0.mlp.down"}
    assert product.widened == {"0.mlp.gate", "0.mlp.up", "head"}
    one = plan_for(mlp_ranges(**{"0.mlp.up": Range(True, 1, float("inf"))}))
    assert one.scaled == {"0.mlp.up"}
    assert one.widened == {"0.mlp.gate", "0.mlp.down", "head"}
    parallel = {"0.mlp.up": Range(True, 1, LIMIT * 2), "0.mlp.down": Range(True, 1, 1, True)}
    assert plan_for(mlp_ranges(**parallel)).widened == {"0.mlp.gate", "0.mlp.down", "head"}
    norm = {"norm": Range(False, 0, LIMIT * 2), "0.mlp.down": Range(True, 1, 1, True)}
    assert plan_for(mlp_ranges(**norm)).widened == {"head"}


def test_dtype_follows_the_gpu():
    model = tiny_model("llama")
    assert plan_optimization(model, torch.bfloat16, (8, 0)) == OptimizationPlan(torch.bfloat16)
    old = plan_optimization(model, torch.bfloat16, (7, 5))
    assert old.dtype == torch.float16
    assert "float16 for bfloat16, which needs compute capability 8.0, got 7.5" in old.notes
    with pytest.raises(RuntimeError, match="dtype must be one of float16, bfloat16"):
        optimize_for_tensor_cores(model, torch.float32)
    model.lm_head.weight[0, 0] = 1e5
    with pytest.raises(RuntimeError, match=r"weights must be within float16's 65504.*bfloat16"):
        plan_optimization(model, torch.float16, (7, 5))


def test_statistics_of_norms_stay_float32():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.conv(x))

    model = Net()
    plan = plan_optimization(model, torch.bfloat16, (8, 0))
    assert plan.float32 == {"norm": "norm statistics"}
    apply_plan(model, plan, CPU)
    assert model.conv.weight.dtype == torch.bfloat16
    assert {t.dtype for t in model.norm.state_dict().values()} == {torch.float32, torch.int64}
    assert not model.training
    assert model(torch.randn(2, 4, 9).bfloat16()).isfinite().all()


def test_what_a_model_wants_in_float32_stays_and_so_do_frequencies():
    model = tiny_model("llama")
    model._keep_in_fp32_modules = ["o_proj"]
    plan = plan_optimization(model, torch.float16, (7, 5))
    assert set(plan.float32) == {f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)}
    assert any("float32 (the model asks for it)" in note for note in plan.notes)
    plain = tiny_model("llama")
    plan = plan_optimization(plain, torch.float16, (7, 5))
    apply_plan(plain, plan, CPU)
    assert plain.model.rotary_emb.inv_freq.dtype == torch.float32
    assert plain.model.norm.weight.dtype == torch.float16


def test_a_model_without_a_prompt_says_that_it_was_not_probed():
    model = nn.Sequential(nn.Linear(4, 4))
    plan = plan_optimization(model, torch.float16, (7, 5))
    apply_plan(model, plan, CPU)
    assert any("not guarded against float16 overflow" in note for note in plan.notes)
    assert model(torch.ones(1, 4).half()).dtype == torch.float16


def test_a_calibration_of_ones_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.mul_(1e4)
    x = torch.full((1, 4), 100.0)
    expected = model(x)
    plan = plan_optimization(model, torch.float16, (7, 5))
    apply_plan(model, plan, CPU, {"input": x.half()})
    torch.testing.assert_close(model(x.half()).float(), expected, rtol=1e-2, atol=1e2)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", ["plain", *OVERFLOWS])
def test_on_the_gpu(case, half, caplog):
    model = tiny_model("llama") if case == "plain" else OVERFLOWS[case][0]()
    ids = torch.randint(VOCAB, (2, 11))
    expected = logits_of(model, ids)
    with caplog.at_level(logging.WARNING, "llamatelemetry"):
        assert optimize_for_tensor_cores(model, half) is model
    assert f"{type(model).__name__} on cuda:0: {str(half)[6:]}" in caplog.records[-1].message
    assert torch.backends.cudnn.benchmark
    assert model.device.type == "cuda"
    logits = logits_of(model, ids.cuda()).float().cpu()
    close = 0.02 if half == torch.float16 else 0.1
    assert (logits - expected).abs().max() <= close * expected.abs().max()
