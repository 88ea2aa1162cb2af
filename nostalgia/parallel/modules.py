"""Takes modules out of their wrappers: DDP, FSDP2, and the autocast that Accelerate patches around ``forward``.

Curvature must see the plain network (its products have a precision of their own, and FSDP2's hooks do not
survive a double backward), and every phase of training wraps a plain network anew.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

# Modules that stand for the one they hold: torch.compile's and activation checkpointing's.
TRANSPARENT = ("_orig_mod", "_checkpoint_wrapped_module")
_TRANSPARENT_SEGMENT = re.compile(rf"(^|\.)({'|'.join(TRANSPARENT)})(?=\.|$)")
# What `fully_shard` leaves in a module's instance dictionary besides hooks.
_FSDP_STATE = ("__composable_api", "_is_fsdp_managed_module", "_fsdp_use_orig_params")  # beginnings of names
_REGISTRIES = ("_parameters", "_buffers", "_modules")


def inner_module(model: nn.Module) -> nn.Module:
    """The user's own module inside DDP, torch.compile and checkpoint wrappers; FSDP2 has no wrapper object."""
    while isinstance(model, DistributedDataParallel) or _held(model) is not model:
        model = model.module if isinstance(model, DistributedDataParallel) else _held(model)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model's parameters."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Put FSDP2 modules in their sharded form, no communication.

    A forward without a backward leaves the root's parameters whole: they are then not the objects the optimizer
    knows, and do not follow changes of the shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters, each once, by their names in the unwrapped module; FSDP2's as shards."""
    inner = inner_module(model)
    reshard(inner)
    return {_plain_name(name): parameter for name, parameter in inner.named_parameters()}


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Whole values of all parameters and buffers by plain name, detached; shards are gathered (a collective).

    Parameters that are whole are not copied: they stay the model's own storage. Buffers are copied.
    """
    values = {name: _whole(parameter) for name, parameter in named_parameters(model).items()}
    for name, buffer in inner_module(model).named_buffers():
        values[_plain_name(name)] = _whole(buffer).clone()
    return values


def skeleton(model: nn.Module) -> nn.Module:
    """A structural copy without wrappers, for `torch.func.functional_call`: parameters and buffers on ``meta``.

    Modules and plain containers are copied, and what refers to them (attributes, bound methods, hooks) refers to
    the copies; every other attribute is shared. Tied parameters stay tied, hooks of the user's stay. ``model`` is
    not touched.
    """
    inner = inner_module(model)
    reshard(inner)
    return _Copy(lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta")).of(inner)


def normalise_alone(layer: _BatchNorm) -> None:
    """Let a batch norm take its own batch's statistics: `nn.SyncBatchNorm` would wait for other ranks, and refuses tensors
    that are on no GPU. ``vars(layer).pop("forward")`` takes it back."""
    vars(layer)["forward"] = partial(_BatchNorm.forward, layer)


def bare_module(model: nn.Module) -> nn.Module:
    """An ordinary module with whole parameters, ready to be used or wrapped again.

    DDP and one process: the module inside, its Accelerate patch taken off. FSDP2: a new module whose parameters
    are gathered from the shards (a collective: all ranks call it). ``requires_grad`` and modes are kept.
    """
    inner = inner_module(model)
    if is_sharded(inner):
        reshard(inner)
        return _Copy(lambda t: _whole(t).clone()).of(inner)
    for module in inner.modules():
        _unpatch(module.__dict__, module)
    return inner


def frozen_copy(model: nn.Module) -> nn.Module:
    """An ordinary module in evaluation mode with copies of the whole values of what ``model`` trains, frozen.

    What is frozen in ``model`` already is shared, not copied. FSDP2's shards are gathered: a collective.
    """
    inner = inner_module(model)
    if is_sharded(inner):
        reshard(inner)

    def convert(tensor: Tensor) -> Tensor:
        shared = isinstance(tensor, nn.Parameter) and not tensor.requires_grad and not isinstance(tensor, DTensor)
        return tensor.detach() if shared else _whole(tensor).clone()

    return _Copy(convert).of(inner).requires_grad_(False).eval()


@contextmanager
def unpatched(model: nn.Module) -> Iterator[None]:
    """The model without Accelerate's autocast for the duration."""
    states = [(m, dict(m.__dict__)) for m in model.modules() if "_original_forward" in m.__dict__]
    for module, _ in states:
        _unpatch(module.__dict__, module)
    try:
        yield
    finally:
        for module, state in states:
            for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
                if name in state:
                    module.__dict__[name] = state[name]


def _unpatch(state: dict[str, Any], module: nn.Module) -> None:
    """Take Accelerate's patch off an instance dictionary of ``module`` (its own or a copy)."""
    if "_original_forward" not in state:
        return
    original = state.pop("_original_forward")
    state.pop("_is_accelerate_prepared", None)
    state.pop("forward", None)
    if getattr(original, "__func__", None) is not type(module).forward:
        state["forward"] = original  # a forward the user had put on this instance


def _plain_name(name: str) -> str:
    return _TRANSPARENT_SEGMENT.sub("", name).removeprefix(".")


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


class _Copy:
    """Copies a module tree once; keeps who is whose copy, so that shared things stay shared."""

    def __init__(self, convert: Callable[[Tensor], Tensor]) -> None:
        self.convert = convert
        self.modules: dict[int, nn.Module] = {}
        self.tensors: dict[int, Tensor] = {}
        self.containers: dict[int, Any] = {}

    def of(self, root: nn.Module) -> nn.Module:
        sources = [module for module in root.modules() if _held(module) is module]
        for module in sources:
            kind = _original_class(type(module))
            self.modules[id(module)] = nn.Module.__new__(kind)
        for module in root.modules():
            self.modules[id(module)] = self.modules[id(_held(module))]
        for module in sources:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                self._register(tensor)
        for module in sources:
            self.modules[id(module)].__dict__.update(self._state(module))
        return self.modules[id(root)]

    def _register(self, tensor: Tensor | None) -> None:
        if tensor is None or id(tensor) in self.tensors:
            return
        copy = self.convert(tensor)
        if isinstance(tensor, nn.Parameter):
            copy = nn.Parameter(copy, requires_grad=tensor.requires_grad)
        self.tensors[id(tensor)] = copy

    def _state(self, source: nn.Module) -> dict[str, Any]:
        state = {name: value for name, value in source.__dict__.items() if not name.startswith(_FSDP_STATE)}
        _unpatch(state, source)
        for name in _REGISTRIES:
            state[name] = {key: self._image(value) for key, value in source.__dict__[name].items()}
        for name, value in state.items():
            if name in _REGISTRIES:
                continue
            if isinstance(value, dict) and "_hooks" in name:
                value = {key: hook for key, hook in value.items() if not _is_fsdp_hook(hook)}
                state[name] = OrderedDict((key, self._image(hook)) for key, hook in value.items())
            else:
                state[name] = self._image(value)
        return state

    def _image(self, value: Any) -> Any:
        """What stands for ``value`` in the copy; plain containers are copied, so that the original's stay its own."""
        if value is None or isinstance(value, (bool, int, float, str)):  # most of a module's attributes
            return value
        if isinstance(value, nn.Module):
            return self.modules.get(id(value), value)
        if isinstance(value, Tensor):
            return self.tensors.get(id(value), value)
        if isinstance(value, MethodType):
            owner = self._image(value.__self__) if isinstance(value.__self__, nn.Module) else value.__self__
            return value if owner is value.__self__ else MethodType(value.__func__, owner)
        if type(value) is partial:
            keywords = {key: self._image(item) for key, item in value.keywords.items()}
            return partial(self._image(value.func), *map(self._image, value.args), **keywords)
        if type(value) is tuple:
            return tuple(map(self._image, value))
        if type(value) in (list, set, dict, OrderedDict):
            return self._container(value)
        return value

    def _container(self, value: Any) -> Any:
        if id(value) in self.containers:
            return self.containers[id(value)]
        copy = self.containers[id(value)] = type(value)()
        if isinstance(value, dict):
            copy.update((key, self._image(item)) for key, item in value.items())
        elif isinstance(value, list):
            copy.extend(map(self._image, value))
        else:
            copy.update(map(self._image, value))
        return copy


def _held(module: nn.Module) -> nn.Module:
    """The module itself, or the one that a transparent wrapper stands for."""
    while True:
        own = {**module.__dict__, **module._modules}  # not getattr: PEFT's modules answer for what they hold
        inner = next((own[name] for name in TRANSPARENT if name in own), None)
        if inner is None:
            return module
        module = inner


def _original_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class before ``fully_shard`` mixed `FSDPModule` into it."""
    if not issubclass(kind, FSDPModule):
        return kind
    mixed = (base for base in kind.__mro__[1:] if issubclass(base, nn.Module))
    return next(base for base in mixed if not issubclass(base, FSDPModule))


def _is_fsdp_hook(hook: object) -> bool:
    """FSDP2 registers methods of its per-module state, some of them wrapped to keep the compiler out."""
    while hook is not None:
        owner = getattr(hook, "__self__", None)
        if owner is not None:
            return type(owner).__module__.startswith("torch.distributed.fsdp")
        if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp"):
            return True
        hook = getattr(hook, "__wrapped__", getattr(hook, "_torchdynamo_orig_callable", None))
    return False
