"""The one table of model families: transformers' class, the layer's spec, names of the parts."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace

from llamatelemetry.models.spec import LayerSpec


@dataclass(frozen=True)
class Parts:
    """What a family's causal language model calls its parts; the defaults are Llama's."""

    stack: str = "model"  # the module of the decoder layers
    layers: str = "layers"
    norm: str = "norm"  # after the last layer
    embedding: str = "embed_tokens"
    positions: str = ""  # embedding of positions, added to the tokens'
    rotary: str = "rotary_emb"


@dataclass(frozen=True)
class Family:
    """A row of the table."""

    model_type: str  # transformers' name of its config
    spec: LayerSpec
    parts: Parts = Parts()
    base: str = ""  # class of the module of the decoder layers; "": the row's, ...Model

    def __deepcopy__(self, memo: object) -> Family:
        return self  # a row is one for every copy of a model

    def __reduce__(self) -> tuple[object, ...]:
        for name, row in FAMILIES.items():
            if row is self:
                return _row, (name,)
        raise pickle.PicklingError("a family must be a row of FAMILIES to be pickled")

    def base_of(self, causal: str) -> str:
        """The class of the module of the decoder layers, by that of the causal language model."""
        return self.base or causal.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model")


def _row(name: str) -> Family:
    return FAMILIES[name]


_WINDOW = LayerSpec(window="sliding_window")
# GLM turns pairs of neighbours, by angles that its rotary module lays out in halves.
_GLM = LayerSpec(rope="interleaved", gate_up=("gate_up_proj",))

# Norms of what attention and MLP give, beside those before them, and alone.
_SANDWICH = LayerSpec(
    norm="rms+1",
    attention_norm="post_attention_layernorm",
    middle_norm="pre_feedforward_layernorm",
    mlp_norm="post_feedforward_layernorm",
    activation="hidden_activation",
    window="sliding_window",
    final_softcap="final_logit_softcapping",
)
_POST_NORM = LayerSpec(
    first_norm="",
    attention_norm="post_attention_layernorm",
    middle_norm="",
    mlp_norm="post_feedforward_layernorm",
)
# Attention and MLP read the same norm; pairs of neighbours are turned.
_COHERE = LayerSpec(
    norm="layer",
    middle_norm="",
    parallel=True,
    rope="interleaved",
    rope_angles="pairs",
    logit_scale="logit_scale",
)
_GRANITE = LayerSpec(
    residual_multiplier="residual_multiplier",
    embedding_multiplier="embedding_multiplier",
    logits_scaling="logits_scaling",
)
# Learned positions; the layer's own linears are its MLP.
_OPT = LayerSpec(
    norm="layer",
    first_norm="self_attn_layer_norm",
    middle_norm="final_layer_norm",
    output="out_proj",
    rope="none",
    mlp="",
    mlp_kind="plain",
    gate_up=("fc1",),
    down="fc2",
    activation="activation_function",
)
# Routed experts stay transformers' own module.
_EXPERTS = LayerSpec(mlp_kind="own", window="sliding_window")

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", LayerSpec()),
    "MistralForCausalLM": Family("mistral", _WINDOW),
    "Qwen2ForCausalLM": Family("qwen2", _WINDOW),
    "Qwen3ForCausalLM": Family("qwen3", LayerSpec(qk_norm="head", window="sliding_window")),
    "GraniteForCausalLM": Family("granite", _GRANITE),
    "ApertusForCausalLM": Family(
        "apertus",
        LayerSpec(
            first_norm="attention_layernorm",
            middle_norm="feedforward_layernorm",
            qk_norm="head",
            mlp_kind="own",
        ),
    ),
    "ArceeForCausalLM": Family("arcee", LayerSpec(mlp_kind="ungated", gate_up=("up_proj",))),
    "AfmoeForCausalLM": Family(
        "afmoe",
        LayerSpec(
            attention_norm="post_attention_layernorm",
            middle_norm="pre_mlp_layernorm",
            mlp_norm="post_mlp_layernorm",
            attention_kind="own",
            mlp_kind="own",
            window="sliding_window",
        ),
    ),
    "BioGptForCausalLM": Family(
        "biogpt",
        replace(_OPT, activation="hidden_act"),
        parts=Parts("biogpt", norm="layer_norm", positions="embed_positions", rotary=""),
    ),
    "CohereForCausalLM": Family("cohere", _COHERE),
    "Cohere2ForCausalLM": Family(
        "cohere2", replace(_COHERE, window="sliding_window", use_rope="sliding_window")
    ),
    "CwmForCausalLM": Family("cwm", _WINDOW),
    "Ernie4_5ForCausalLM": Family("ernie4_5", LayerSpec(rope="interleaved")),
    "Exaone4ForCausalLM": Family(
        "exaone4", replace(_POST_NORM, qk_norm="head", window="sliding_window", use_rope="window")
    ),
    "GemmaForCausalLM": Family("gemma", LayerSpec(norm="rms+1")),
    "Gemma2ForCausalLM": Family("gemma2", replace(_SANDWICH, softcap="attn_logit_softcapping")),
    "Gemma3ForCausalLM": Family(
        "gemma3_text", replace(_SANDWICH, qk_norm="head"), base="Gemma3TextModel"
    ),
    "GlmForCausalLM": Family("glm", _GLM),
    "Glm4ForCausalLM": Family(
        "glm4",
        replace(_GLM, attention_norm="post_self_attn_layernorm", mlp_norm="post_mlp_layernorm"),
    ),
    "GPT2LMHeadModel": Family(
        "gpt2",
        LayerSpec(
            norm="layer",
            first_norm="ln_1",
            middle_norm="ln_2",
            attention="attn",
            qkv=("c_attn",),
            output="c_proj",
            rope="none",
            mlp_kind="ungated",
            gate_up=("c_fc",),
            down="c_proj",
            activation="activation_function",
        ),
        parts=Parts("transformer", "h", "ln_f", "wte", positions="wpe", rotary=""),
    ),
    "GPTNeoXForCausalLM": Family(
        "gpt_neox",
        LayerSpec(
            norm="layer",
            attention="attention",
            qkv=("query_key_value",),
            qkv_order="heads",
            output="dense",
            head_dim="head_size",
            parallel="use_parallel_residual",
            mlp_kind="ungated",
            gate_up=("dense_h_to_4h",),
            down="dense_4h_to_h",
        ),
        parts=Parts("gpt_neox", norm="final_layer_norm", embedding="embed_in"),
    ),
    "GptOssForCausalLM": Family(
        "gpt_oss", replace(_EXPERTS, sinks="sinks", rope_angles="once", router_scores=True)
    ),
    "GraniteMoeForCausalLM": Family(
        "granitemoe", replace(_GRANITE, mlp="block_sparse_moe", mlp_kind="own")
    ),
    "HunYuanDenseV1ForCausalLM": Family(
        "hunyuan_v1_dense",
        LayerSpec(
            qk_norm="head",
            qk_norm_names=("query_layernorm", "key_layernorm"),
            qk_norm_after_rope=True,
        ),
    ),
    "HyperCLOVAXForCausalLM": Family(
        "hyperclovax",
        replace(
            _GRANITE,
            attention_norm="post_norm1",
            mlp_norm="post_norm2",
            logits_scaling="",
            logit_scale="logits_scaling",
        ),
    ),
    "HeliumForCausalLM": Family("helium", LayerSpec(rope="interleaved")),
    "MiniCPM3ForCausalLM": Family(
        "minicpm3",
        LayerSpec(
            attention_kind="own",
            residual_multiplier="residual_scale",
            logits_scaling="logits_scaling",
        ),
    ),
    "MinistralForCausalLM": Family("ministral", _WINDOW),
    "MixtralForCausalLM": Family("mixtral", _EXPERTS),
    "NemotronForCausalLM": Family(
        "nemotron", LayerSpec(norm="layer+1", mlp_kind="ungated", gate_up=("up_proj",))
    ),
    "Olmo2ForCausalLM": Family("olmo2", replace(_POST_NORM, qk_norm="full")),
    "Olmo3ForCausalLM": Family(
        "olmo3", replace(_POST_NORM, qk_norm="full", window="sliding_window")
    ),
    "OlmoForCausalLM": Family("olmo", LayerSpec(norm="layer")),
    "OlmoeForCausalLM": Family("olmoe", LayerSpec(qk_norm="full", mlp_kind="own")),
    "OPTForCausalLM": Family(
        "opt",
        _OPT,
        parts=Parts(
            "model.decoder", norm="final_layer_norm", positions="embed_positions", rotary=""
        ),
        base="OPTDecoder",
    ),
    "PersimmonForCausalLM": Family(
        "persimmon",
        LayerSpec(
            norm="layer",
            attention_kind="own",
            mlp_kind="ungated",
            gate_up=("dense_h_to_4h",),
            down="dense_4h_to_h",
        ),
        parts=Parts(norm="final_layernorm"),
    ),
    "PhiForCausalLM": Family(
        "phi",
        LayerSpec(
            norm="layer",
            middle_norm="",
            parallel=True,
            output="dense",
            mlp_kind="ungated",
            gate_up=("fc1",),
            down="fc2",
        ),
        parts=Parts(norm="final_layernorm"),
    ),
    "Phi3ForCausalLM": Family(
        "phi3", LayerSpec(qkv=("qkv_proj",), gate_up=("gate_up_proj",), window="sliding_window")
    ),
    "Qwen2VLForConditionalGeneration": Family("qwen2_vl_text", _WINDOW, base="Qwen2VLTextModel"),
    "Qwen2_5_VLForConditionalGeneration": Family(
        "qwen2_5_vl_text", _WINDOW, base="Qwen2_5_VLTextModel"
    ),
    "Qwen2MoeForCausalLM": Family("qwen2_moe", _EXPERTS),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", replace(_EXPERTS, qk_norm="head")),
    "SeedOssForCausalLM": Family("seed_oss", LayerSpec()),
    "SmolLM3ForCausalLM": Family(
        "smollm3", LayerSpec(use_rope="use_rope", window="sliding_window")
    ),
    "StableLmForCausalLM": Family(
        "stablelm", LayerSpec(norm="layer", parallel="use_parallel_residual")
    ),
    "Starcoder2ForCausalLM": Family(
        "starcoder2",
        LayerSpec(
            norm="layer",
            mlp_kind="ungated",
            gate_up=("c_fc",),
            down="c_proj",
            window="sliding_window",
        ),
    ),
    "VaultGemmaForCausalLM": Family(
        "vaultgemma",
        replace(_SANDWICH, attention_norm="", mlp_norm="", softcap="attn_logit_softcapping"),
    ),
}
