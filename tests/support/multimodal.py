"""Tiny random models that take images too, and a prompt with one for each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from families import VOCAB
from hf_models import TINY_SIZES

IMAGE = VOCAB - 1  # the token that stands for a piece of an image
TEXT = {
    "vocab_size": VOCAB,
    **TINY_SIZES,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
_PATCHES = {"depth": 1, "num_heads": 4, "patch_size": 4, "temporal_patch_size": 2}
_PATCHES |= {"spatial_merge_size": 2, "hidden_size": 64}


def _llava() -> Any:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
    )


def _gemma3() -> Any:
    layers = ["sliding_attention", "full_attention"]
    return transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**_VISION),
        text_config=transformers.Gemma3TextConfig(
            **TEXT, head_dim=16, sliding_window=8, layer_types=layers
        ),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
    )


def _mistral3() -> Any:
    return transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(**_VISION | {"patch_size": 2}),
        text_config=transformers.MistralConfig(**TEXT, head_dim=16, sliding_window=None),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )


def _qwen(name: str, **vision: Any) -> Any:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    text = TEXT | {"rope_parameters": rope} | ({"head_dim": 16} if name == "Qwen3VL" else {})
    return getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config=_PATCHES | vision,
        image_token_id=IMAGE,
        video_token_id=VOCAB - 2,
        vision_start_token_id=VOCAB - 3,
        vision_end_token_id=VOCAB - 4,
    )


# name -> (config, tokens that an image takes)
MODELS: dict[str, tuple[Callable[[], Any], int]] = {
    "Llava": (_llava, 16),
    "Gemma3": (_gemma3, 4),
    "Mistral3": (_mistral3, 16),
    "Qwen2VL": (lambda: _qwen("Qwen2VL", embed_dim=64, mlp_ratio=2), 4),
    "Qwen3VL": (
        lambda: _qwen(
            "Qwen3VL",
            out_hidden_size=64,
            intermediate_size=96,
            deepstack_visual_indexes=[0],
            num_position_embeddings=16,
        ),
        4,
    ),
}


def tiny_multimodal(name: str, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The model, and a prompt with an image, as its processor would give it."""
    config, count = MODELS[name]
    kind = getattr(transformers, f"{name}ForConditionalGeneration")
    with torch.inference_mode(False), torch.no_grad():
        model = kind._from_config(config(), attn_implementation="eager").eval()
        for parameter in model.parameters():
            parameter.normal_(float(parameter.ndim == 1), 0.15)
    ids = torch.randint(2, VOCAB - 4, (1, count + 9))
    ids[:, 1], ids[:, 2 : 2 + count], ids[:, 2 + count] = VOCAB - 3, IMAGE, VOCAB - 4
    kinds = (ids == IMAGE).int()
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)}
    if name == "Mistral3":
        inputs["image_sizes"] = torch.tensor([[16, 16]])
    if name.startswith("Qwen"):
        inputs["pixel_values"] = torch.randn(16, 3 * 2 * 4 * 4)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    known = inspect.signature(model.forward).parameters
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in known and name != "Llava":
            inputs[key] = kinds
    return model.to(device), {key: value.to(device) for key, value in inputs.items()}
