"""What is wrong with a model's files, in one sentence, whichever library found it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LONGEST = 400  # characters of another library's words


class ModelFileError(ValueError):
    """A model cannot be loaded: one sentence that names the file and what is wrong with it.

    Example:
        >>> load_model("nowhere.gguf")
        Traceback (most recent call last):
            ...
        llamatelemetry.loading.errors.ModelFileError: nowhere.gguf: must be ...
    """


@contextmanager
def in_one_sentence(path: Path | str, what: str = "transformers cannot load it") -> Iterator[None]:
    """Turns what transformers, tokenizers, safetensors and torch raise into a ModelFileError.

    Args:
        path: of the file or directory that is read in the body.
        what: what could not be done with it.
    """
    try:
        yield
    except (ModelFileError, MemoryError):
        raise
    except Exception as error:  # tokenizers raises plain Exception, a config whatever it trips over
        if is_out_of_memory(error):
            raise
        raise ModelFileError(f"{path}: {what}: {sentence_of(error)}") from error


def sentence_of(error: Exception) -> str:
    """An exception's words on one line; its type where they say little without it."""
    words = " ".join(str(error).split())
    if "custom code which must be executed" in words:
        return "it brings code of its own, which is never run here"
    if type(error).__name__ == "UnpicklingError":
        return "its pickled weights are damaged or hold more than tensors; convert to safetensors"
    if len(words) > _LONGEST:
        words = words[:_LONGEST].rsplit(" ", 1)[0] + " ..."
    if isinstance(error, (OSError, ValueError, RuntimeError, ImportError)) and words:
        return words
    return f"{type(error).__name__}: {words}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is for want of memory, on the CPU or a GPU."""
    name, words = type(error).__name__, str(error)
    return name in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in words
