"""What every piece is: it stands for one module, and understands how that one is called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn

from llamatelemetry.models.opset import NATIVE, OpSet
from llamatelemetry.models.pieces.arguments import parameters_of
from llamatelemetry.models.pieces.merge import apart
from llamatelemetry.models.pieces.watch import FLOATS, Kinds, Watch, has_gradients, in_another_mode
from llamatelemetry.models.spec import LayerSpec

_OF_COPIES = (
    "module", "spec", "_stack_config", "ops", "width", "parameters", "dtype", "name", "report",
    "_own_forward", "_is_installed", "_is_left", "_proved",
)  # fmt: skip


class Piece:
    """Stands for one module: puts its forward in the module's place, and takes it out again.

    On every call it looks whether what it was bound to still stands. Where it does not, the
    module's own forward runs, hooks and all; once the new parts have stood for two calls and are
    of the kind that was proved, the piece binds to them.

    Attributes:
        parameters: names of the parameters of the module's own forward, in order.
        linears: parts whose weights are held as one, where they are alike; merged: what holds them.
        name: of the module in its model, once installed.

    Raises:
        ValueError, AttributeError: the module is not of the piece's kind after all, or its forward
            has a parameter that the piece does not know.
    """

    known: frozenset[str] = frozenset({"hidden_states", "x"})
    name: str = ""
    report: Any = None  # patching's, told where the piece stands aside for good
    _own_forward: Any = None  # what the module had of its own in forward's place
    _is_installed: bool | None = None  # None: not yet; False: not any more
    _is_left = False  # the report says so
    follows = 0  # how often it was bound to other parts since it was installed
    _proved: Kinds | None = None  # the parts that were bound first
    _watch: Watch | None = None  # those that are bound; None: of a copy, bound at its first call
    _seen: Watch | None = None  # those that the last call found in their place

    def __init__(
        self, module: nn.Module, spec: LayerSpec, config: Any, ops: OpSet = NATIVE
    ) -> None:
        self.module: Any = module
        self.spec, self.ops = spec, ops
        self._stack_config = config
        self.width = int(config.hidden_size)
        self.linears: list[nn.Module] = []
        self.merged: list[nn.Module] = []
        if self._is_installed is None:
            self._own_forward = module.__dict__.get("forward")
        self.parameters = parameters_of(self.original, self.known)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_meta:
                raise ValueError(f"weights must be in memory, got {name} on the meta device")
        self.dtype = next((p.dtype for p in module.parameters() if p.dtype in FLOATS), None)

    @property
    def config(self) -> Any:
        """The module's as it is now, or its stack's where it has none."""
        return vars(self.module).get("config", self._stack_config)

    @property
    def original(self) -> Callable[..., Any]:
        """The module's own forward."""
        if self._own_forward is not None:
            return self._own_forward
        return MethodType(type(self.module).forward, self.module)

    def run_original(self, *args: Any, **kwargs: Any) -> Any:
        """A call of it: torch 2.11's Dynamo cannot trace the making of a method."""
        if self._own_forward is not None:
            return self._own_forward(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def bind(self) -> None:
        """Takes the module's tensors in hand; again whenever they have moved."""

    def bypassed(self) -> list[tuple[str, nn.Module]]:
        """The parts, by name, that the piece computes without calling them: all of its module's."""
        return [(name, part) for name, part in self.module.named_modules() if name]

    def numbers(self) -> list[tuple[Any, str]]:
        """(who has it, its name) of what the piece reads once besides tensors."""
        return []

    def _parts(self) -> list[tuple[str, nn.Module]]:
        return [("", self.module), *self.bypassed()]

    def watch(self) -> None:
        """Notes what the piece is bound to, for changed."""
        self._watch = Watch(self._parts(), self.linears, self.numbers())
        self._proved, self._seen = self._proved or self._watch.kinds, None

    def stands_aside(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the module's own forward is to run this call."""
        if self._is_installed is None:  # the probe calls it
            return False
        x = args[0] if args else kwargs.get(self.parameters[0])
        if torch.is_grad_enabled() and has_gradients(self.module, (*args, *kwargs.values())):
            return True
        return in_another_mode(self.module, self.dtype, x) or self.changed() is not None

    def changed(self) -> str | None:
        """Why the piece is not its module's any more, after binding again where that may be.

        While Dynamo traces, what is looked at becomes guards, and nothing is bound.
        """
        if torch.compiler.is_compiling():
            return None if self._watch is None else self._watch.broken(memory=False)
        reason = "it is a copy" if self._watch is None else self._watch.broken()
        if reason is None:
            self._seen = None
            if self._is_left:
                self._come_back()
            return None
        return self._follow(reason)

    def _follow(self, reason: str) -> str | None:
        """Binds to the parts that are there now, or says why not."""
        if not self._is_installed:
            return reason  # something still holds the forward of a piece that was removed
        now = Watch(self._parts(), (), self.numbers())
        linears = [part for name, part in self._parts() if name in self.merged_names()]
        held = [] if self._watch is None else self._watch.tensors()
        held += [x for one in self.merged for x in (*one.parameters(), *one.buffers())]
        obstacle = now.obstacle(self._proved, linears, held)
        # What stands there for one call alone, as with functional_call, is not worth a copy.
        is_new = self._seen is None or self._seen.broken() is not None
        if obstacle is None and self._watch is not None and is_new:
            self._seen = now
            return reason
        if obstacle is None:
            try:
                self.follows += self._watch is not None
                self.rebind()
                return None
            except Exception as error:  # of whatever the module is made of
                obstacle = f"{type(error).__name__}: {error}"
        self._seen = None
        self._is_left = True
        if self.report is not None:
            self.report.leave(self.name, obstacle)
        return obstacle

    def is_replaced(self) -> bool:
        """Whether parts are others than those it is bound to, hooks aside."""
        return self._watch is not None and self._watch.broken(hooks=False) is not None

    def _come_back(self) -> None:
        self._is_left = False
        if self.report is not None:
            self.report.come_back(self.name)

    def merged_names(self) -> Sequence[str]:
        """Names of the module's linears whose weights bind makes one."""
        return ()

    def unbind(self) -> None:
        """Gives back what bind took."""

    def read_window(self) -> None:
        """Takes the sliding window from where the module has it, which the probe shortens."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by the names that the module's own forward has for them."""
        return dict(zip(self.parameters, args, strict=False)) | dict(kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, which is a piece of its own: what it is bound to, it takes at its first call.

        So merged weights are copied once, as their modules' parameters.
        """
        return {key: self.__dict__[key] for key in _OF_COPIES if key in self.__dict__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.linears, self.merged = [], []

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = type(self.module)._apply(self.module, *args, **kwargs)
        self.moved()
        return result

    def moved(self, *_: Any) -> None:
        """Binds again at once, unless the parts are of other kinds: the next call says so."""
        if self._watch is None or Watch(self._parts()).kinds != self._proved:
            return
        try:
            self.rebind()
        except Exception:  # of whatever the module is made of now
            self._watch = None  # the next call tries again, and says why not

    def rebind(self) -> None:
        type(self).__init__(self, self.module, self.spec, self._stack_config, self.ops)
        self.watch()
        if self._is_left:
            self._come_back()

    def install(self, name: str = "", report: Any = None) -> None:
        self.name, self.report, self._is_installed = name, report, True
        self.watch()
        self.module.forward = self.forward
        self.module._apply = self._apply
        self.module.register_load_state_dict_post_hook(self.moved)
        if self.merged_names():
            self.module._register_state_dict_hook(self.give_apart)

    def give_apart(self, module: Any, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        """Has a state_dict hold merged weights as tensors apart, over the memory that they have.

        Who saves one takes tensors of one storage for one weight under several names.
        """
        for name in self.merged_names():
            for key in (f"{prefix}{name}.weight", f"{prefix}{name}.bias"):
                if (tensor := state_dict.get(key)) is not None:
                    state_dict[key] = apart(tensor)

    def remove(self) -> None:
        self._is_installed, self._watch = False, None
        own = vars(self.module)
        for key, value in list(own.items()):
            if getattr(value, "__self__", None) is not self:
                continue
            if key not in ("forward", "_apply"):  # accelerate keeps the forward it has wrapped
                own[key] = self.original
            elif key == "forward" and self._own_forward is not None:
                own[key] = self._own_forward
            else:
                del own[key]
        for hooks in (self.module._load_state_dict_post_hooks, self.module._state_dict_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "__self__", None) is self:
                    del hooks[key]
        self.unbind()


def eager_attention_of(module: nn.Module) -> Callable[..., Any]:
    """transformers' plain attention for this module; a subclass has its base class's."""
    for kind in type(module).__mro__:
        eager = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise ValueError("the module of the attention's class must have eager_attention_forward")
