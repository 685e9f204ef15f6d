"""A transformers model and its tokenizer from a directory; an adapter's with its base model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llamatelemetry.loading.errors import ModelFileError, in_one_sentence
from llamatelemetry.loading.files import check_directory, json_object
from llamatelemetry.loading.quantised import build_quantised, quantization_of
from llamatelemetry.quantization.layouts import has_static_inputs

ADAPTER = "adapter_config.json"
# Nothing outside the directory is fetched, and no code in it is run.
_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model")  # of any kind of tokenizer


@dataclass(frozen=True)
class Directory:
    """What a directory holds."""

    model: Any
    tokenizer: Any
    eos_ids: tuple[int, ...]
    generation: dict[str, Any]  # what its generation_config says, less what is transformers' own


def load_directory(
    path: Path,
    dtype: torch.dtype | None,
    find: Callable[[str], Path],
    device: torch.device | None = None,
    exact: bool = False,
) -> Directory:
    """Loads a directory with a config.json, or one with an adapter_config.json of peft.

    Args:
        path: of the directory.
        dtype: of the weights; None is that of the files.
        find: the directory of an adapter's base model.
        device: where quantised weights are unpacked and stay; the CPU by default, where all others
            are.
        exact: float32 activations in quantised linears instead of int8 ones on the CPU.

    Raises:
        ModelFileError: naming the file or directory. A tensor that is missing or of another shape
            is an error: it would be random.
    """
    if (path / ADAPTER).is_file():
        return _load_adapter(path, dtype, find)
    from transformers import AutoConfig

    quantization = quantization_of(check_directory(path))
    with in_one_sentence(path / "config.json", "transformers cannot read it"):
        config = AutoConfig.from_pretrained(path, **_LOCAL)
    tokenizer = _load_tokenizer(path)
    if quantization is not None:
        place = device or torch.device("cpu")
        model = build_quantised(path, config, quantization, dtype, place, exact)
        if has_static_inputs(quantization):
            warnings.warn(
                f"load_model: {path}: scales of the linears' inputs (a static activation scheme) "
                "are not used; their weights alone are in 8 bits",
                stacklevel=3,
            )
        _read_generation_config(path, model)
        return Directory(model, tokenizer, _eos_ids(path, model, tokenizer), _generation(model))
    with in_one_sentence(path):
        model, found = _auto_class(config).from_pretrained(
            path,
            dtype=dtype or "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **_LOCAL,
        )
    _check_loaded(path, found)
    return Directory(model, tokenizer, _eos_ids(path, model, tokenizer), _generation(model))


def _auto_class(config: Any) -> Any:
    """Of causal language models, or of those that take images too and generate text alone."""
    import transformers

    kind = type(config)
    if kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if kind in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM  # whose refusal says it


def _read_generation_config(path: Path, model: Any) -> None:
    from transformers import GenerationConfig

    if (path / "generation_config.json").is_file():
        with in_one_sentence(path / "generation_config.json", "transformers cannot read it"):
            model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)


def _load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with in_one_sentence(path, "transformers cannot load its tokenizer"):
            return AutoTokenizer.from_pretrained(path, **_LOCAL)
    except ModelFileError as error:  # which then speaks of packages
        if any(any(path.glob(name)) for name in _TOKENIZER_FILES):
            raise
        raise ModelFileError(
            f"{path}: it has no tokenizer files, such as tokenizer.json; "
            "tokenizer.save_pretrained(directory) writes them"
        ) from error


def _check_loaded(path: Path, found: dict[str, Any]) -> None:
    """Refuses random weights; says what was left out."""
    if mismatched := sorted(found.get("mismatched_keys") or (), key=lambda row: str(row[0])):
        name, theirs, ours = (*mismatched[0], None, None)[:3]
        raise ModelFileError(
            f"{path}: {name} must be {_shape(ours)} as config.json says, got {_shape(theirs)} in "
            f"the weights{_others(mismatched)}"
        )
    if missing := sorted(found.get("missing_keys") or ()):
        raise ModelFileError(f"{path}: the weights hold no {missing[0]}{_others(missing)}")
    if errors := found.get("error_msgs"):
        raise ModelFileError(f"{path}: transformers cannot load it: {errors[0]!s:.300}")
    if unexpected := sorted(found.get("unexpected_keys") or ()):
        warnings.warn(
            f"load_model: {path}: the weights' {unexpected[0]}{_others(unexpected)} is no part of "
            "the model that config.json describes, and is left out",
            stacklevel=4,
        )


def _shape(size: Any) -> str:
    return str(tuple(size)) if isinstance(size, Iterable) else str(size)


def _others(names: Iterable[object]) -> str:
    count = sum(1 for _ in names) - 1
    return f" (and {count} more)" if count else ""


def _eos_ids(path: Path, model: Any, tokenizer: Any) -> tuple[int, ...]:
    """What ends a text: by the generation config, the config, or else the tokenizer."""
    generation = getattr(model, "generation_config", None)
    said = [getattr(generation, "eos_token_id", None), getattr(model.config, "eos_token_id", None)]
    eos = next((value for value in said if value is not None), tokenizer.eos_token_id)
    ids = eos if isinstance(eos, (list, tuple)) else [eos]
    if not all(i is None or type(i) is int for i in ids):
        raise ModelFileError(f"{path}: eos_token_id must be a token's id or several, got {eos!r}")
    size = model.get_input_embeddings().weight.shape[0]
    if strange := [i for i in ids if i is not None and i != -1 and not 0 <= i < size]:
        warnings.warn(
            f"load_model: {path}: eos_token_id {strange[0]} is none of the {size} tokens, and is "
            "left out",
            stacklevel=4,
        )
    return tuple(i for i in ids if i is not None and 0 <= i < size)


def _generation(model: Any) -> dict[str, Any]:
    config = getattr(model, "generation_config", None)
    return dict(config.to_diff_dict()) if config is not None else {}


def _load_adapter(path: Path, dtype: torch.dtype | None, find: Callable[[str], Path]) -> Directory:
    """The base model with the adapter merged into its weights, which then run as any others."""
    config = json_object(path / ADAPTER)
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ModelFileError(f"{path / ADAPTER}: base_model_name_or_path must name a model")
    try:
        from peft import PeftModel
    except ImportError:
        raise ModelFileError(
            f"{path}: an adapter needs peft, which is not installed; pip install peft"
        ) from None
    base_path = path / name if (path / name / "config.json").is_file() else find(name)
    if not base_path.is_dir() or (base_path / ADAPTER).is_file():
        raise ModelFileError(f"{path}: the adapter's base must be a model's directory, got {name}")
    base = load_directory(base_path, dtype, find)
    with in_one_sentence(path, "peft cannot load it"), warnings.catch_warnings():
        # Weights that the adapter lacks stay random; peft only warns.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        _fit_vocabulary(base.model, path)
        adapted = PeftModel.from_pretrained(base.model, path)
        if not hasattr(adapted.base_model, "merge_and_unload"):
            raise ValueError(f"an adapter of type {config.get('peft_type')} cannot be merged")
        model = adapted.merge_and_unload(safe_merge=True)
    has_own = any((path / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = _load_tokenizer(path) if has_own else base.tokenizer
    return Directory(model, tokenizer, base.eos_ids, base.generation)


def _fit_vocabulary(model: Any, path: Path) -> None:
    """Gives a base model the rows of an adapter that was trained with more tokens than it has.

    Raises:
        ValueError: the adapter does not bring all of the new rows, which would be random.
    """
    from safetensors import safe_open

    file = path / "adapter_model.safetensors"
    if not file.is_file():
        return
    modules = {
        "input embeddings": model.get_input_embeddings(),
        "vocabulary projection": model.get_output_embeddings(),
    }
    names = {module: name for name, module in model.named_modules()}
    with safe_open(file, "pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    rows: dict[str, int] = {}
    for what, module in modules.items():
        if not isinstance(weight := getattr(module, "weight", None), torch.Tensor):
            return
        for name, shape in shapes.items():
            inside = f".{names[module]}." in name and name.endswith(".weight")
            if inside and len(shape) == 2 and shape[1] == weight.shape[1] and "lora_" not in name:
                rows[what] = shape[0]
    count = model.get_input_embeddings().weight.shape[0]
    if all(found == count for found in rows.values()):
        return
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if len(set(rows.values())) > 1 or (len(rows) < len(modules) and not is_tied):
        raise ValueError(f"its tokens must be the base model's {count}, or as many in both {rows}")
    model.resize_token_embeddings(max(rows.values()), mean_resizing=False)
