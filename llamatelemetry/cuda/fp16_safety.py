"""float16 inference of models whose activations exceed float16's 65504.

A probe runs a calibration prompt with every product in float32 and notes the largest values. Where
all stay well below the limit nothing is changed. Otherwise the residual stream is kept in float32:
embeddings and the last product of each block return float32, norms then do too, and every other
product takes its input in float16 again. A product whose own input or output is too large gets the
rows of its input scaled, and returns float32. Weights, attention and KV cache stay float16.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from llamatelemetry.cuda.scaled_matmul import FLOAT16_MAX, scaled_matmul

HEADROOM = 8.0  # other prompts may go beyond the calibration prompt by so much
LIMIT = FLOAT16_MAX / HEADROOM


@dataclass
class Range:
    """The largest magnitudes that a module took and gave; inf where one was not finite.

    Attributes:
        is_product: whether the module is a product with a weight; only then input is noted.
        input: of the first input.
        output: of the first output, which is the hidden state where there are several.
        is_parallel: whether it took the tensor that the product before it in its block took, as
            the key's and the value's do after the query's.
    """

    is_product: bool
    input: float = 0.0
    output: float = 0.0
    is_parallel: bool = False


@dataclass(frozen=True)
class Fp16Plan:
    """What keeps a model's float16 in range.

    Attributes:
        scaled: products whose input is scaled and whose output is float32.
        widened: products in float16 whose output becomes float32.
        largest: the module with the largest value of all, and that value; for the notice.
    """

    scaled: frozenset[str] = frozenset()
    widened: frozenset[str] = frozenset()
    largest: tuple[str, float] = ("", 0.0)

    def __bool__(self) -> bool:
        """Whether anything has to be done."""
        return bool(self.scaled or self.widened)


@dataclass
class Fp16Guard:
    """An applied plan, which remove takes out again."""

    hooks: list[Any] = field(default_factory=list)
    replaced: list[tuple[nn.Module, Any]] = field(default_factory=list)

    def remove(self) -> None:
        """Restores every module's own forward."""
        for hook in self.hooks:
            hook.remove()
        for module, forward in self.replaced:
            del module.forward
            if forward is not None:
                module.forward = forward
        self.hooks, self.replaced = [], []


def calibration_inputs(model: Any) -> dict[str, Any]:
    """A prompt for the probe: the first token of a text, then tokens from all over the vocabulary.

    Args:
        model: a transformers model that takes input_ids.

    Returns:
        Keyword arguments of its forward.

    Raises:
        ValueError: the model takes no input_ids, so a prompt must be given.
    """
    config, text = getattr(model, "config", None), _text_config(model)
    vocab_size = getattr(text, "vocab_size", None)
    if vocab_size is None:
        raise ValueError(
            f"fp16 probe: model must have a config with a vocab_size, got {type(model).__name__}; "
            "pass calibration inputs"
        )
    device = next(model.parameters()).device
    ids = torch.arange(1, 33, device=device).mul_(max(vocab_size // 33, 1)) % vocab_size
    first = getattr(text, "bos_token_id", None)
    if isinstance(first, int) and 0 <= first < vocab_size:
        ids[0] = first
    inputs: dict[str, Any] = {"input_ids": ids.unsqueeze(0)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if hasattr(text, "use_cache"):
        inputs["use_cache"] = False
    return inputs


@torch.no_grad()
def probe(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Range]:
    """Runs inputs with every product in float32, and notes how large values become.

    Args:
        model: in float16 or any other dtype, in eval mode; is left as it was.
        inputs: keyword arguments of its forward.

    Returns:
        Module name -> its range, in the order of their first calls.
    """
    ranges: dict[str, Range] = {}
    names = {module: name for name, module in model.named_modules()}
    products = frozenset(name for module, name in names.items() if is_product(module))
    guard = apply(model, Fp16Plan(scaled=products))
    taken: dict[str, Any] = {}  # block -> what its last product took

    def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        name = names[module]
        seen = ranges.setdefault(name, Range(name in products))
        if seen.is_product:  # others may take masks, whose values are as large as can be
            block, first = _block(name), next(iter((*args, *kwargs.values())))
            seen.input = max(seen.input, largest_in(first))
            seen.is_parallel = taken.get(block) is first
            taken[block] = first
        seen.output = max(seen.output, largest_in(out))

    hooks = [m.register_forward_hook(note, with_kwargs=True) for m in names if m is not model]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
        guard.remove()
    return ranges


def plan_for(ranges: Mapping[str, Range]) -> Fp16Plan:
    """Which products of a probed model to scale, and which to widen.

    Args:
        ranges: what probe returned.

    Returns:
        An empty plan where every value is within LIMIT.
    """
    largest = {name: max(r.input, r.output) for name, r in ranges.items()}
    worst = max(largest, key=lambda name: largest[name], default="")
    if not worst or largest[worst] <= LIMIT:
        return Fp16Plan()
    products = [name for name, r in ranges.items() if r.is_product]
    scaled = {name for name in products if largest[name] > LIMIT}
    widened: set[str] = set()
    blocks: dict[str, list[str]] = {}
    for name in products:
        blocks.setdefault(_block(name), []).append(name)
    for names in blocks.values():
        *before, last = names
        if ranges[last].is_parallel:  # the output product has a block of its own
            before, last = names, ""
        else:
            widened.add(last)  # is added to the residual
        # What stands between the products of a block (gate times up, attention) works in the type
        # of their outputs, which then must agree.
        if any(largest[name] > LIMIT for name in before) or (last and ranges[last].input > LIMIT):
            widened.update(before)
    return Fp16Plan(frozenset(scaled), frozenset(widened - scaled), (worst, largest[worst]))


def apply(model: nn.Module, plan: Fp16Plan) -> Fp16Guard:
    """Puts a plan in place.

    Args:
        model: changed in place.
        plan: an empty one changes nothing.

    Returns:
        What takes it out again.
    """
    guard = Fp16Guard()
    if not plan:
        return guard
    modules = dict(model.named_modules())
    everything = all(name in plan.scaled for name, m in modules.items() if is_product(m))
    width = None if everything else _hidden_size(model)
    for name, module in modules.items():
        if name in plan.scaled:
            _replace_forward(guard, module, _scaled_forward)
        elif type(module) is nn.LayerNorm:
            _replace_forward(guard, module, _wide_layer_norm)
        elif isinstance(module, nn.Embedding):
            if width in (None, module.embedding_dim):
                guard.hooks.append(module.register_forward_hook(_to_float32))
        elif any(p is not None and p.ndim > 1 for p in module._parameters.values()):
            hook = module.register_forward_pre_hook(_inputs_to_dtype, with_kwargs=True)
            guard.hooks.append(hook)
            if name in plan.widened:
                guard.hooks.append(module.register_forward_hook(_to_float32))
        elif any("inv_freq" in buffer for buffer in module._buffers):
            dtype = _dtype_of(model)
            guard.hooks.append(module.register_forward_hook(_caster(dtype)))
    return guard


def _replace_forward(guard: Fp16Guard, module: Any, forward: Callable[..., Any]) -> None:
    guard.replaced.append((module, module.__dict__.get("forward")))
    module.forward = types.MethodType(forward, module)  # a method, so that it follows a deepcopy


def is_product(module: nn.Module) -> bool:
    """Whether a module is one product with a weight: a Linear or transformers' Conv1D."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _scaled_forward(self: Any, x: Tensor) -> Tensor:
    """A product's forward in float32, from a float16 weight; replaces a forward as a method."""
    weight = self.weight.t() if isinstance(self, nn.Linear) else self.weight
    out = scaled_matmul(x, weight, torch.float16)
    return out if self.bias is None else out + self.bias.float()


def _wide_layer_norm(self: nn.LayerNorm, x: Tensor) -> Tensor:
    """F.layer_norm takes no float32 input beside float16 weights."""
    weight, bias = (None if v is None else v.float() for v in (self.weight, self.bias))
    out = functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)
    return out.to(x.dtype)


def _inputs_to_dtype(module: nn.Module, args: Any, kwargs: Any) -> Any:
    dtype = next(p.dtype for p in module._parameters.values() if p is not None)
    if not dtype.is_floating_point:
        return args, kwargs  # packed weights take any input
    return _cast((args, kwargs), dtype)


def _to_float32(module: nn.Module, args: Any, out: Any) -> Any:
    return _cast(out, torch.float32)


def _caster(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda module, args, out: _cast(out, dtype)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    wide = (torch.float16, torch.bfloat16, torch.float32)

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.dtype in wide else leaf

    return pytree.tree_map(cast, tree)


def _block(name: str) -> str:
    return name.rpartition(".")[0]


def largest_in(tree: Any) -> float:
    """The largest magnitude in the first floating tensor of a tree; inf if one is not finite."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
            largest = leaf.abs().max().item()
            return largest if largest == largest else float("inf")
    return 0.0


def _dtype_of(model: nn.Module) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for p in model.parameters():
        if p.is_floating_point():
            sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def _hidden_size(model: nn.Module) -> int | None:
    return getattr(_text_config(model), "hidden_size", None)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def some_of(names: Collection[str], limit: int = 3) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + more
