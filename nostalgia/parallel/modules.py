"""Takes modules out of their wrappers: DDP, FSDP2, and the autocast that Accelerate patches around ``forward``.

Curvature must see the plain network (its products have a precision of their own, and FSDP2's hooks do not survive a
double backward), and every phase of training wraps a plain network anew.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

# What Accelerate leaves in a prepared module's instance dictionary.
_PATCHES = ("forward", "_original_forward", "_is_accelerate_prepared")


def inner_module(model: nn.Module) -> nn.Module:
    """The user's own module inside DDP and torch.compile wrappers; FSDP2 has no wrapper object."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds the parameters; puts them back to shards, which a forward pass may have left gathered."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.reshard()
    return bool(units)


def skeleton(model: nn.Module) -> nn.Module:
    """A structural copy without wrappers, for `torch.func.functional_call`: parameters and buffers on ``meta``.

    Modules are copied, everything else they refer to is shared; tied parameters stay tied. Hooks of the user's stay,
    those of FSDP2 go. ``model`` is not touched.
    """
    return _clone(inner_module(model), lambda t: t.detach().to("meta"))


def bare_module(model: nn.Module) -> nn.Module:
    """An ordinary module with whole parameters, ready to be used or wrapped again.

    DDP and one process: the module inside, its Accelerate patch taken off. FSDP2: a new module whose parameters are
    gathered from the shards (a collective: all ranks call it). ``requires_grad`` and training modes are kept.
    """
    inner = inner_module(model)
    if is_sharded(inner):
        bare = _clone(inner, _whole)
        return bare
    for module in inner.modules():
        if "_original_forward" in module.__dict__:
            for name in _PATCHES:
                module.__dict__.pop(name, None)
    return inner


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().detach().clone() if isinstance(tensor, DTensor) else tensor.detach()


def _clone(root: nn.Module, convert: Callable[[Tensor], Tensor]) -> nn.Module:
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, Tensor] = {}
    for module in root.modules():
        kind = _original_class(type(module))
        modules[id(module)] = kind.__new__(kind)
    for module in root.modules():
        _fill(module, modules, tensors, convert)
    return modules[id(root)]


def _fill(
    source: nn.Module, modules: dict[int, nn.Module], tensors: dict[int, Tensor], convert: Callable[[Tensor], Tensor]
) -> None:
    """Give the copy of ``source`` its contents: its own registries, and the rest of its attributes shared."""

    def tensor(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        if id(value) not in tensors:
            converted = convert(value)
            if isinstance(value, nn.Parameter):
                converted = nn.Parameter(converted, requires_grad=value.requires_grad)
            tensors[id(value)] = converted
        return tensors[id(value)]

    state = dict(source.__dict__)
    if "_original_forward" in state:
        for name in _PATCHES:
            state.pop(name, None)
    for name in [name for name in state if "composable_api" in str(name)]:
        del state[name]  # the mark by which fully_shard knows a module it has been applied to
    for name, value in list(state.items()):
        if isinstance(value, nn.Module) and id(value) in modules:
            state[name] = modules[id(value)]
        elif name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            state[name] = type(value)((key, hook) for key, hook in value.items() if not _is_fsdp_hook(hook))
        elif isinstance(value, (dict, set)) and name.startswith("_"):
            state[name] = type(value)(value) if type(value) in (dict, set) else value.copy()
    state["_parameters"] = {name: tensor(value) for name, value in source._parameters.items()}
    state["_buffers"] = {name: tensor(value) for name, value in source._buffers.items()}
    state["_modules"] = {
        name: None if child is None else modules[id(child)] for name, child in source._modules.items()
    }
    modules[id(source)].__dict__.update(state)


def _original_class(kind: type) -> type:
    """The class before ``fully_shard`` mixed `FSDPModule` into it."""
    if not issubclass(kind, FSDPModule):
        return kind
    return next(base for base in kind.__mro__[1:] if base is not FSDPModule and not issubclass(base, FSDPModule))


def _is_fsdp_hook(hook: object) -> bool:
    """FSDP2 registers methods of its per-module state, some of them wrapped to keep the compiler out."""
    for _ in range(4):
        owner = getattr(hook, "__self__", None)
        if owner is not None:
            return type(owner).__module__.startswith("torch.distributed.fsdp")
        hook = getattr(hook, "__wrapped__", getattr(hook, "_torchdynamo_orig_callable", None))
        if hook is None:
            return False
    return False


def full_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Names and whole values of all parameters and buffers, detached; shards are gathered (a collective).

    Whole parameters are not copied: they stay the model's own storage.
    """
    inner = inner_module(model)
    is_sharded(inner)
    values: dict[str, Tensor] = {}
    for name, tensor in [*inner.named_parameters(), *inner.named_buffers()]:
        values[name] = _whole(tensor) if isinstance(tensor, DTensor) else tensor.detach()
    return values


