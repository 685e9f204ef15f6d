"""What patch does with every causal class of transformers, tried on tiny random models.

``python tests/support/reach.py`` prints the tables of docs/models.md; with --write it puts them
there. Truth is the model itself with eager attention, in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llamatelemetry.models.hf_attention import NAME, attention_forward, choose_ours, register
from llamatelemetry.models.patching import PatchReport, patch
from llamatelemetry.models.whole import WholeProbe

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- reach.py -->", "<!-- end -->"
KINDS = ("whole", "in part", "attention only", "not")
VOCAB, SEQLEN, NEW_TOKENS = 128, 12, 8
MOST_PARAMETERS = 5_000_000

# Sizes by their names in transformers' configs; a config takes those that it has.
_SIZES = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "sliding_window": 4,
    "max_position_embeddings": 128,
    "n_positions": 128,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    "num_key_value_heads": 2,
    "head_dim": 16,
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "mamba_n_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_d_state", "mamba_head_dim", "state_size"), 16),
    "mamba_d_ssm": 128,
    "mamba_num_heads": 8,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
}
_LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}


@dataclasses.dataclass
class Result:
    """What patch did with a class.

    Attributes:
        kind: one of KINDS; "wrong" where the model then gave something else.
        why: what stands in the way of more.
    """

    name: str
    kind: str
    why: str = ""


def causal_classes() -> list[tuple[str, str]]:
    """(model_type, class) of transformers' causal language models, each class once."""
    found: dict[str, str] = {}
    for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for name in (names,) if isinstance(names, str) else names:
            if name.endswith(("ForCausalLM", "LMHeadModel")):
                found.setdefault(name, model_type)
    return sorted((model_type, name) for name, model_type in found.items())


def tiny(model_type: str, name: str) -> Any:
    """A random model of a class, or None where these sizes make none that is small and runs."""
    try:
        kind, config_kind = getattr(transformers, name), transformers.CONFIG_MAPPING[model_type]
        default = config_kind()
        sizes = _SIZES | (_LATENT if hasattr(default, "kv_lora_rank") else {})
        config = config_kind(**{k: v for k, v in sizes.items() if hasattr(default, k)})
        with torch.device("meta"):
            count = sum(p.numel() for p in kind(config).parameters())
        if count > MOST_PARAMETERS:
            return None
        model = kind._from_config(config, attn_implementation="eager").eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.15 * noise + (parameter if parameter.ndim == 1 else 0))
        return model if _logits(model, "padded").isfinite().all() else None
    except Exception:  # of whatever a class asks of its config
        return None


def tried(model_type: str, name: str) -> Result | None:
    """What patch does with a class; None where no tiny model of it could be made."""
    model = tiny(model_type, name)
    if model is None:
        return None
    truths = _truths(model)
    try:
        report = patch(model)
    except ValueError as error:
        report = PatchReport(refused={"": str(error).partition(",")[0]})
    why = "; ".join(dict.fromkeys(report.refused.values())) or report.not_packed or ""
    if report.replaced:
        kind = "in part" if why else "whole"
        if kind == "whole" and (difference := WholeProbe.of_patched(model)):
            return Result(name, "wrong", difference)
    else:
        kind, why = _attention_alone(model)
    for batch, theirs in truths.items():
        if difference := _difference(_outputs(model, batch), theirs):
            return Result(name, "wrong", f"{batch}: {difference}")
    return Result(name, kind, why)


def _attention_alone(model: Any) -> tuple[str, str]:
    """Whether our attention runs once it is chosen, and why it does not."""
    try:
        choose_ours(model, "reach")
    except Exception as error:  # of whatever a class raises for a name that it does not know
        return "not", str(error)
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return attention_forward(*args, **kwargs)

    transformers.AttentionInterface.register(NAME, counted)
    try:
        _logits(model, "plain")
    finally:
        register()
    return ("attention only", "") if calls else ("not", "no attention goes through the interface")


def _batch(name: str) -> dict[str, Tensor]:
    ids = (torch.arange(2 * SEQLEN) * 37 + 5).remainder(VOCAB - 2).add(2).view(2, SEQLEN)
    mask = torch.ones_like(ids)
    if name == "padded":
        mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _logits(model: Any, batch: str) -> Tensor:
    inputs = _batch(batch)
    return model(**inputs).logits[inputs["attention_mask"].bool()]


def _outputs(model: Any, batch: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, greedy tokens, and how far each of these was ahead of the next best."""
    out = model.generate(
        **_batch(batch),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.stack(out.logits, 1).topk(2).values
    return _logits(model, batch), out.sequences[:, SEQLEN:], best[..., 0] - best[..., 1]


def _truths(model: Any) -> dict[str, list[tuple[Tensor, ...]]]:
    """What the model gives for each batch under its own attentions.

    With eager attention, and with torch's where the class has it: a class that makes no mask is
    causal under that alone. Padding has no right value where the two differ on it and agree
    without (recurrent layers, which take what stands in padding further).
    """
    truths = {batch: [_outputs(model, batch)] for batch in ("plain", "padded")}
    try:
        model.set_attn_implementation("sdpa")
    except (ValueError, KeyError):
        return truths
    for batch, theirs in truths.items():
        theirs.append(_outputs(model, batch))
    model.set_attn_implementation("eager")
    if _difference(truths["padded"][0], truths["padded"][1:]) and not _difference(
        truths["plain"][0], truths["plain"][1:]
    ):
        del truths["padded"]
    return truths


def _difference(ours: tuple[Tensor, ...], truths: list[tuple[Tensor, ...]]) -> str | None:
    """How ours differs from every one of the truths; None where it is one of them."""
    differences = [_difference_from(ours, truth) for truth in truths]
    return None if None in differences else "; ".join(filter(None, differences))


def _difference_from(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> str | None:
    error = (ours[0] - truth[0]).abs().max() / truth[0].abs().max()
    if not error <= 1e-3:
        return f"logits err by {error:.3g} of the largest"
    for row in range(len(truth[1])):
        differs = (ours[1][row] != truth[1][row]).nonzero().flatten().tolist()
        if differs and truth[2][row, differs[0]] > 1e-3:
            return "greedy tokens are others"
    return None


@torch.no_grad()
def results(names: list[str] | None = None) -> Iterator[Result]:
    """What patch does with each class, or with those of these names."""
    for model_type, name in causal_classes():
        if names is None or name in names:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = tried(model_type, name)
            if result is not None:
                yield result


def table(found: list[Result]) -> str:
    """The part of docs/models.md that this script writes."""
    counts = {kind: sum(result.kind == kind for result in found) for kind in (*KINDS, "wrong")}
    lines = [f"{len(found)} classes of transformers {transformers.__version__}:", ""]
    lines += ["| " + " | ".join(counts) + " |", "|---" * len(counts) + "|"]
    lines.append("| " + " | ".join(map(str, counts.values())) + " |")
    for kind in counts:
        rows = [result for result in found if result.kind == kind]
        if rows:
            lines += ["", f"**{kind}**: " + ", ".join(short(row.name) for row in rows) + "."]
    return "\n".join(line for text in lines for line in _wrapped(text)) + "\n"


def short(name: str) -> str:
    """A class's name in the table."""
    return name.removesuffix("ForCausalLM").removesuffix("LMHeadModel")


def _wrapped(text: str) -> list[str]:
    return [text] if text.startswith("|") else textwrap.wrap(text, 100) or [""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/models.md")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = []
    for result in results():
        found.append(result)
        print(f"{result.kind:15} {result.name} {result.why[:200]}", file=sys.stderr, flush=True)
    if not arguments.write:
        print(table(found))
        return
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table(found)}{END}{after}")


if __name__ == "__main__":
    main()
