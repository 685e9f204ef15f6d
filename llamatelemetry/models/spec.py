"""What a decoder layer computes, as data that one interpreter reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True)
class LayerSpec:
    """Where a decoder layer departs from Llama's; the defaults are Llama's.

    Names are of attributes of transformers' modules; "" is what a family lacks.
    """

    # The four places a norm can stand in; +1: the weight is stored less 1.
    norm: Literal["rms", "rms+1", "layer", "layer+1"] = "rms"
    first_norm: str = "input_layernorm"  # before the attention
    attention_norm: str = ""  # of the attention's output
    middle_norm: str = "post_attention_layernorm"  # before the MLP
    mlp_norm: str = ""  # of the MLP's output
    # Attention and MLP both read the layer's input, each through its norm or both through the
    # first. A name is of the config: whether they do.
    parallel: bool | str = False

    attention: str = "self_attn"
    attention_kind: Literal["projected", "own"] = "projected"  # own: the module's forward
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")  # one name: a fused linear
    qkv_order: Literal["parts", "heads"] = "parts"  # of a fused one: all of q first, or by head
    output: str = "o_proj"
    head_dim: str = "head_dim"
    qk_norm: Literal["none", "head", "full"] = "none"  # over each head, or over all of them
    qk_norm_names: tuple[str, str] = ("q_norm", "k_norm")
    qk_norm_after_rope: bool = False
    rope: Literal["half", "interleaved", "none"] = "half"  # rotary_dim is the tables' width
    # How the rotary module lays its angles out: in halves, in pairs, or each once.
    rope_angles: Literal["halves", "pairs", "once"] = "halves"
    # Of the attention: whether it turns q and k. "window": where a window is, or no layer has one.
    use_rope: str = ""
    scale: str = "scaling"
    window: str = ""  # of the attention or its config: keys seen, the query's own included
    softcap: str = ""
    sinks: str = ""

    # gated: act(gate) * up. ungated: act(up). own: the module's forward. plain: ungated, of linears
    # of the layer itself.
    mlp: str = "mlp"
    mlp_kind: Literal["gated", "ungated", "own", "plain"] = "gated"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")  # one name: a fused linear, or up alone
    down: str = "down_proj"
    activation: str = "hidden_act"  # of the config
    router_scores: bool = False  # the MLP gives them too, after its output

    residual_multiplier: str = ""  # of the layer
    embedding_multiplier: str = ""  # of the base model
    logits_scaling: str = ""  # of the config, divides the logits
    logit_scale: str = ""  # of the config, multiplies the logits
    final_softcap: str = ""  # of the config

    @property
    def norms(self) -> list[str]:
        """The names of the norms that a layer has, in the order they are computed in."""
        places = (self.first_norm, self.attention_norm, self.middle_norm, self.mlp_norm)
        return [name for name in places if name]


# Fields of transformers' configs that change what a layer computes: the LayerSpec field that reads
# each ("" while none does), and the values that change nothing.
_CONFIG_FIELDS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "add_cross_attention": ("", (None, False)),
    "alibi": ("", (None, False)),
    "attention_chunk_size": ("", (None,)),
    "attn_logit_softcapping": ("softcap", (None,)),
    "attn_output_gate": ("", (None, False)),
    "clip_qkv": ("", (None,)),
    "do_layer_norm_before": ("", (None, True)),
    "embedding_multiplier": ("embedding_multiplier", (1.0,)),
    "final_logit_softcapping": ("final_softcap", (None,)),
    "hidden_size_per_layer_input": ("", (None, 0)),
    "logit_scale": ("logit_scale", (None, 1.0)),
    "logits_scaling": ("logits_scaling", (1.0,)),
    "n_routed_experts": ("mlp_kind", (None, 0, 1)),
    "num_experts": ("mlp_kind", (None, 0, 1)),
    "num_kv_shared_layers": ("", (None, 0)),
    "num_local_experts": ("mlp_kind", (None, 0, 1)),
    "qk_layernorm": ("", (None, False)),
    "residual_multiplier": ("residual_multiplier", (1.0,)),
    "sliding_window": ("window", (None,)),
    "use_parallel_residual": ("parallel", (None, False)),
    "use_qk_norm": ("qk_norm", (None, False)),
}
_OF_ATTENTION = {  # which reads them itself where it stays the module's own
    "attn_logit_softcapping",
    "attn_output_gate",
    "clip_qkv",
    "qk_layernorm",
    "use_qk_norm",
}
# Kinds of attention that layer_types may name, and the LayerSpec field that reads each.
_LAYER_TYPES = {"full_attention": None, "sliding_attention": "window"}


def unread_field(spec: LayerSpec, config: Any) -> str | None:
    """Why a model of this config is not what spec says; None where spec reads all that matters."""
    named = [value for value in vars(spec).values() if isinstance(value, str)]
    for name, (field, neutral) in _CONFIG_FIELDS.items():
        value, is_read = getattr(config, name, None), _reads(spec, field) or name in named
        is_read = is_read or (spec.attention_kind == "own" and name in _OF_ATTENTION)
        if value is not None and value not in neutral and not is_read:
            return _unread(name, neutral[-1], value)
    ropes = getattr(config, "no_rope_layers", None)
    if ropes and not all(ropes) and not spec.use_rope:
        return _unread("no_rope_layers", "all 1", ropes)
    for kind in _unique(getattr(config, "layer_types", None) or ()):
        reader = _LAYER_TYPES.get(kind, "")
        if reader is not None and not _reads(spec, reader):
            return _unread("layer_types", "full_attention", kind)
    return None


def _reads(spec: LayerSpec, field: str) -> bool:
    return field != "" and getattr(spec, field) != _DEFAULTS[field]


def _unread(name: str, neutral: object, value: object) -> str:
    return (
        f"config.{name} must be {neutral}, as this family's LayerSpec does not read it, "
        f"got {value!r:.80}"
    )


def _unique(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


_DEFAULTS = {field.name: field.default for field in fields(LayerSpec)}
