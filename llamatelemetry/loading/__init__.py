"""Models and tokenizers from files: GGUF and transformers directories."""

from typing import TYPE_CHECKING

from llamatelemetry._lazy import lazy_names

if TYPE_CHECKING:
    from llamatelemetry.loading.dense import load_dense as load_dense
    from llamatelemetry.loading.find import LoadedModel as LoadedModel
    from llamatelemetry.loading.find import ModelFileError as ModelFileError
    from llamatelemetry.loading.find import find_model as find_model
    from llamatelemetry.loading.find import load_model as load_model

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "dense": ("load_dense",),
        "find": ("LoadedModel", "ModelFileError", "find_model", "load_model"),
    },
)
