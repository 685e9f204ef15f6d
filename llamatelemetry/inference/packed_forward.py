"""A patched model's forward over a PackedCache: packed prefill, then one replay a token.

It stands in the model's forward and hands everything else on to the forward that it replaced.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from llamatelemetry.inference.kv_pages import floating_parameter
from llamatelemetry.inference.packed_cache import PackedCache
from llamatelemetry.inference.packed_rows import PackedRows
from llamatelemetry.inference.shared_pages import SharedPages
from llamatelemetry.models.forwards import StandIn
from llamatelemetry.models.patching import why_not_forward_tokens
from llamatelemetry.models.pieces.arguments import CACHE_NAMES
from llamatelemetry.models.pieces.watch import SERVED

_log = logging.getLogger("llamatelemetry")

_READ = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", *CACHE_NAMES}
# generate hands it on, and no forward reads it.
_UNREAD = {"tokenizer", "return_dict"}
# What changes nothing where it is false, and must be.
_SWITCHES = ("output_attentions", "output_hidden_states", "output_router_logits")


class NotServed(Exception):
    """Why a call goes to the model's own forward."""


class PackedForward(StandIn):
    """A model's forward, which runs calls with a PackedCache by itself.

    Attributes:
        users: who has asked for it.
        shared: the paged cache of all the model's generations.
    """

    def __init__(self, model: Any) -> None:
        self.users: set[str] = set()
        super().__init__(model)

    def _start(self) -> None:
        self.shared = SharedPages(self._model)
        self._reasons: set[str] = set()
        signature = inspect.signature(self._original)
        self._parameters = tuple(signature.parameters)
        self._output = _output_class(signature.return_annotation)

    def clear(self) -> None:
        """Lets go of the pages; caches that are open keep theirs."""
        self._start()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"users": set(self.users)}

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call is one with a PackedCache: it has recordings or graphs of its own."""
        return any(isinstance(value, PackedCache) for value in (*args, *kwargs.values()))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._original(*args, **kwargs)
        call = dict(zip(self._parameters, args, strict=False)) | kwargs
        cache = next((call[name] for name in CACHE_NAMES if call.get(name) is not None), None)
        if not isinstance(cache, PackedCache) or cache.rows is None:
            return self._original(*args, **kwargs)
        try:
            self._check_mode(call)
            with self.shared.turn():
                logits = self._logits(cache, call)
        except NotServed as reason:
            self._note(str(reason))
            cache.unpack(trains=torch.is_grad_enabled())
            return self._original(*args, **kwargs)
        assert self._output is not None
        named = {field.name for field in dataclasses.fields(self._output)}
        output = {name: cache for name in CACHE_NAMES if name in named}
        return self._output(logits=logits, **output)

    def _note(self, reason: str) -> None:
        if reason not in self._reasons:
            self._reasons.add(reason)
            _log.warning(
                "%s runs without the packed decoder: %s", type(self._model).__name__, reason
            )

    def _check_mode(self, call: dict[str, Any]) -> None:
        """Refuses what a call asks for besides logits."""
        model, config = self._model, self._model.config
        if torch.is_grad_enabled():
            raise NotServed("gradients are enabled; use torch.inference_mode()")
        if model.training:
            raise NotServed("it is in training mode; call eval()")
        like = floating_parameter(model)
        if like.dtype not in SERVED:
            raise NotServed(f"its dtype is {like.dtype}")
        if torch.is_autocast_enabled(like.device.type):
            raise NotServed("autocast is on")
        for name in _SWITCHES:
            asked = call.get(name)
            if asked or (asked is None and getattr(config, name, False)):
                raise NotServed(f"{name} is asked for")
        for name, value in call.items():
            if value is not None and name not in _READ | _UNREAD and name not in _SWITCHES:
                raise NotServed(f"it is called with {name}")
        returns_dict = call.get("return_dict")
        if returns_dict is None:
            returns_dict = getattr(config, "return_dict", True)
        if not returns_dict or self._output is None:
            raise NotServed("a tuple is asked for, or an output of its own")
        if call.get("use_cache") is False:
            raise NotServed("use_cache is False")

    def _logits(self, cache: PackedCache, call: dict[str, Any]) -> Tensor:
        """[batch, kept, vocab_size]"""
        rows, ids = cache.rows, call.get("input_ids")
        if rows is None:
            raise NotServed("another thread has taken the cache out of its pages")
        if rows.shared is not self.shared or rows.is_stale:
            raise NotServed("the cache is another model's, or the model was moved since")
        device = self.shared.device
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64:
            raise NotServed("input_ids are no [batch, length] int64")
        if ids.device != device:
            raise NotServed(f"input_ids are on {ids.device}, the model on {device}")
        batch, new = ids.shape
        if new == 0 or batch == 0 or (rows.batch and rows.batch != batch):
            raise NotServed(f"input_ids are {batch} rows of {new} for a cache of {rows.batch} rows")
        kept = call.get("logits_to_keep", 0)
        if type(kept) is not int or kept < 0:
            raise NotServed("logits_to_keep is no count")
        padding = self._padding(rows, call, batch, new)
        kept = min(kept or new, new)
        if rows.columns == 0 and max(padding) > new - kept:
            raise NotServed("logits of padding are asked for")
        try:
            if new == 1 and rows.columns:
                return self._decoded(rows, ids.reshape(-1)).unsqueeze(1)
            self._check_model()
            return rows.prefill(ids, padding, kept)
        except ValueError as error:  # of a rotary embedding without one table
            raise NotServed(str(error)) from error

    def _decoded(self, rows: PackedRows, ids: Tensor) -> Tensor:
        """A replay is looked at while the GPU works: it does not count if it was in vain."""
        replays = rows.replays()
        if not replays:
            self._check_model()
        logits = rows.decode(ids)
        if replays:
            self._check_model()
        rows.took_step()
        return logits

    def _check_model(self) -> None:
        if (reason := why_not_forward_tokens(self._model)) is not None:
            raise NotServed(reason)

    def _padding(self, rows: PackedRows, call: dict[str, Any], batch: int, new: int) -> list[int]:
        """Columns of padding of each row; refuses masks and positions of other kinds."""
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        total, is_first = rows.columns + new, rows.columns == 0
        padding = rows.padding if not is_first else [0] * batch
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.shape != (batch, total):
                raise NotServed(f"attention_mask is no [{batch}, {total}]")
            if is_first:
                first = mask.bool().to(torch.uint8).argmax(1)
                padding = [] if not batch else first.tolist()
        if positions is not None and (
            not isinstance(positions, Tensor) or positions.shape not in ((batch, new), (1, new))
        ):
            raise NotServed(f"position_ids are no [{batch}, {new}]")
        places = rows.places(new, padding)
        fits = [] if mask is None else [(mask.bool() == (places >= 0)).all()]
        if positions is not None:
            places = places[:, rows.columns :]
            fits.append(((positions == places) | (places < 0)).all())
        if any(padding) and len(fits) < 2:
            _check_hidden(rows, mask)
            raise NotServed("attention_mask and position_ids must be given with padding")
        if fits and not bool(torch.stack(fits).all()):  # once, as this waits for the GPU
            _check_hidden(rows, mask)
            raise NotServed(
                "attention_mask hides more than padding on the left, or position_ids do not fit it"
            )
        return padding


def _check_hidden(rows: PackedRows, mask: Tensor | None) -> None:
    """Refuses to show what was padding before: nothing was kept of it."""
    if rows.columns == 0:
        return
    padding = torch.tensor(rows.padding, dtype=torch.int64, device=rows.shared.device)
    hidden = torch.arange(rows.columns, device=padding.device) < padding[:, None]
    shown = hidden if mask is None else hidden & mask[:, : rows.columns].bool()
    if bool(shown.any()):
        raise ValueError(
            "attention_mask must hide the padding that it hid when it was cached, whose keys were "
            f"left out, got columns {sorted(set(shown.nonzero()[:, 1].tolist()))} shown"
        )


def _output_class(annotation: Any) -> type[ModelOutput] | None:
    """The class of outputs that a forward says it returns; None where it has no logits."""
    for kind in (annotation, *getattr(annotation, "__args__", ())):
        is_output = isinstance(kind, type) and issubclass(kind, ModelOutput)
        if is_output and "logits" in {field.name for field in dataclasses.fields(kind)}:
            return kind
    return None
