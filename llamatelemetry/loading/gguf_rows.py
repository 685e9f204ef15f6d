"""The one table of GGUF architectures: what their files say, and how, of transformers' models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from llamatelemetry.loading.gguf_file import GgufFile

_NONE: Mapping[str, Any] = MappingProxyType({})

_RMS = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
_LAYER = "attention.layer_norm_epsilon"
_BIASES = {"attention_bias": "attn_q.bias"}


@dataclass(frozen=True)
class GgufRow:
    """How files of an architecture tell what transformers' config and modules need.

    A key is of the metadata, less the architecture; a field is of transformers' config; a tensor
    is of the first block, less "blk.0.". The tensors' own names are the gguf package's.
    """

    model_type: str  # transformers' name of the config
    when: str = ""  # the row is of files that have this key, and not at zero
    sizes: Mapping[str, str] = field(default_factory=lambda: _NONE)  # key -> field, whole numbers
    numbers: Mapping[str, str] = field(default_factory=lambda: _NONE)  # key -> field
    unread: tuple[str, ...] = ()  # keys of what the tensors or the class say already
    epsilon: tuple[str, str] = _RMS  # key, field
    fixed: Mapping[str, Any] = field(default_factory=lambda: _NONE)  # fields that no key is of
    # Fields that are true where the file has a tensor, and those that are true where it has not.
    has: Mapping[str, str] = field(default_factory=lambda: _NONE)
    lacks: Mapping[str, str] = field(default_factory=lambda: _NONE)
    # parameter -> tensor, where the gguf package knows no name
    tensors: Mapping[str, str] = field(default_factory=lambda: _NONE)
    # tensor -> list of modules, the weight of each a row of it; only some files have them
    stacks: Mapping[str, str] = field(default_factory=lambda: _NONE)

    interleaved: bool = False  # rows of q and k come in pairs that one angle turns
    one_added: bool = False  # weights of norms come with the 1 that transformers' modules add
    experts: bool = False
    window: bool = False  # attention.sliding_window may be there
    # Where there is a window, every so manieth layer sees all, should the file not say which.
    full_every: int = 0
    # query_pre_attn_scalar is the head's width, but in the model of so many layers: hidden / heads.
    wide_scale_at: int = 0
    partial_rope: bool = False  # rope.dimension_count may be less than the head's width
    # Sliding layers turn by angles of their own, unscaled. Their base where no key says it; 0 is
    # that of the others.
    sliding_rope: float | None = None
    rope: Mapping[str, Any] = field(default_factory=lambda: _NONE)  # of rope_parameters, fixed
    rope_keys: Mapping[str, str] = field(default_factory=lambda: _NONE)  # key -> rope parameter


_LLAMA = GgufRow(
    "llama", interleaved=True, has={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"}
)
_GRANITE = GgufRow(
    "granite",
    interleaved=True,
    has=_LLAMA.has,
    numbers={
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
)
_EXPERTS = {"expert_used_count": "num_experts_per_tok"}
_GEMMA2 = GgufRow(
    "gemma2",
    numbers={
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    has=_BIASES,
    one_added=True,
    window=True,
    full_every=2,
    wide_scale_at=46,
)
_COHERE = GgufRow(
    "cohere",
    numbers={"logit_scale": "logit_scale"},
    epsilon=(_LAYER, "layer_norm_eps"),
    has={**_BIASES, "use_qk_norm": "attn_q_norm.weight"},
)
_QWEN2_MOE = GgufRow(
    "qwen2_moe",
    sizes={
        **_EXPERTS,
        "expert_count": "num_experts",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    },
    has={"qkv_bias": "attn_q.bias"},
    experts=True,
)

# For each architecture the rows to try, in order; the last is of every file.
ARCHITECTURES: dict[str, tuple[GgufRow, ...]] = {
    "llama": (
        GgufRow(
            "mixtral",
            when="expert_count",
            sizes={**_EXPERTS, "expert_count": "num_local_experts"},
            interleaved=True,
            experts=True,
        ),
        _LLAMA,
    ),
    "qwen2": (GgufRow("qwen2"),),
    "qwen3": (GgufRow("qwen3"),),
    "granite": (_GRANITE,),
    "arcee": (replace(_LLAMA, model_type="arcee"),),
    "command-r": (_COHERE,),
    "cohere2": (
        replace(
            _COHERE,
            model_type="cohere2",
            has=_BIASES,
            window=True,
            full_every=4,
        ),
    ),
    "ernie4_5": (GgufRow("ernie4_5", has={"use_bias": "attn_q.bias"}),),
    "exaone4": (GgufRow("exaone4", window=True, full_every=4),),
    "gemma": (GgufRow("gemma", has=_BIASES, one_added=True),),
    "gemma2": (_GEMMA2,),
    "gemma3": (
        replace(
            _GEMMA2,
            model_type="gemma3_text",
            numbers={"final_logit_softcapping": "final_logit_softcapping"},
            full_every=6,
            wide_scale_at=62,
            sliding_rope=10000.0,
        ),
    ),
    "glm4": (GgufRow("glm4", has=_BIASES, partial_rope=True),),
    "gpt-oss": (
        GgufRow(
            "gpt_oss",
            sizes={
                **_EXPERTS,
                "expert_count": "num_local_experts",
                "expert_feed_forward_length": "intermediate_size",
            },
            has=_BIASES,
            experts=True,
            window=True,
            full_every=2,
            rope={"truncate": False},
        ),
    ),
    "granitemoe": (
        replace(
            _GRANITE,
            model_type="granitemoe",
            has=_BIASES,
            sizes={**_EXPERTS, "expert_count": "num_local_experts"},
            tensors={"block_sparse_moe.router.weight": "ffn_gate_inp.weight"},
            experts=True,
        ),
    ),
    "mistral3": (
        GgufRow(
            "ministral3",
            interleaved=True,
            rope={"llama_4_scaling_beta": 0.0, "mscale": 1.0},  # mscale counts beside the other
            rope_keys={
                "attention.temperature_scale": "llama_4_scaling_beta",
                "rope.scaling.yarn_log_multiplier": "mscale_all_dim",
            },
        ),
    ),
    "olmo2": (
        GgufRow(
            "olmo3",
            when="attention.sliding_window",
            has=_BIASES,
            window=True,
            full_every=4,
            sliding_rope=0.0,
        ),
        GgufRow("olmo2", has=_BIASES),
    ),
    "olmoe": (
        GgufRow(
            "olmoe",
            sizes={**_EXPERTS, "expert_count": "num_experts"},
            has=_BIASES,
            experts=True,
        ),
    ),
    "phi3": (
        GgufRow(
            "phi3",
            window=True,
            partial_rope=True,
            rope_keys={"rope.scaling.attn_factor": "attention_factor"},
        ),
    ),
    "qwen2moe": (_QWEN2_MOE,),
    "qwen3moe": (
        replace(
            _QWEN2_MOE,
            model_type="qwen3_moe",
            has=_BIASES,
            fixed={"norm_topk_prob": True},  # no key says it; every file's model does
        ),
    ),
    "seed_oss": (GgufRow("seed_oss", has={**_BIASES, "attention_out_bias": "attn_output.bias"}),),
    "smollm3": (replace(_LLAMA, model_type="smollm3"),),
    "stablelm": (
        GgufRow(
            "stablelm",
            epsilon=(_LAYER, "layer_norm_eps"),
            has={"use_qkv_bias": "attn_q.bias", "qk_layernorm": "attn_q_norm.weight"},
            stacks={
                "attn_q_norm.weight": "self_attn.q_layernorm.norms",
                "attn_k_norm.weight": "self_attn.k_layernorm.norms",
            },
            lacks={"use_parallel_residual": "ffn_norm.weight"},
            unread=("use_parallel_residual",),
            partial_rope=True,
        ),
    ),
    "starcoder2": (
        GgufRow(
            "starcoder2",
            epsilon=(_LAYER, "norm_epsilon"),
            has={"use_bias": "attn_q.bias"},
            window=True,
        ),
    ),
}


def row_of_file(file: GgufFile) -> GgufRow:
    """The row of the file's architecture.

    Raises:
        ModelFileError: an architecture that no row is of.
    """
    architecture = file.value("general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise file.unserved(
            f"general.architecture must be one of {', '.join(ARCHITECTURES)}, got "
            f"{architecture:.80}"
        )
    *special, plain = ARCHITECTURES[architecture]
    for row in special:
        if file.metadata.get(f"{architecture}.{row.when}"):
            return row
    return plain
