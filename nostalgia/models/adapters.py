"""LoRA adapters by PEFT: which layers get one, in old and new names, and taking them off again for export.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import copy
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from nostalgia.errors import UsageError
from nostalgia.models.backbone import Backbone
from nostalgia.models.backbones import has_adapters
from nostalgia.models.seeding import seeded
from nostalgia.parallel.tensors import gathered

logger = logging.getLogger(__name__)

#: Query, key, value and output projections of attention, as the libraries name them.
ATTENTION = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "out_proj",
    "query",
    "key",
    "value",
    "attention.output.dense",
    "qkv",
    "attn.proj",
)

#: Names of transformers before 5, longest first, and what it calls the same layers since.
RENAMED = {
    "attention.output.dense": ("o_proj",),
    "intermediate.dense": ("fc1",),
    "output.dense": ("o_proj", "fc2"),
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "dense": ("o_proj", "fc1", "fc2"),
}
#: The other way round, for architectures that have kept the former names.
FORMER = {
    "q_proj": ("query",),
    "k_proj": ("key",),
    "v_proj": ("value",),
    "o_proj": ("attention.output.dense",),
    "fc1": ("intermediate.dense",),
    "fc2": ("output.dense",),
}


def attach_lora(
    backbone: Backbone,
    *,
    r: int,
    alpha: int,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
    seed: int = 0,
) -> None:
    """Freeze ``backbone`` and give the target layers ``W + (alpha / r) B A``, with A, B trainable and B = 0
    at first.

    ``target_modules`` are ends of layer names (``q_proj``, ``attention.query``); None takes the attention's
    projections, and in a network without attention layers every linear and convolution layer but the first.
    The adapters' values depend on ``seed`` alone. A layer with whose adapter the network does not run is left out, with a
    warning, where None was given. Raises UsageError when a name matches no layer, or one of those layers.
    """
    if r < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise UsageError(
            f"model.lora: r={r}, alpha={alpha}, dropout={dropout}; wanted are r >= 1, alpha > 0 and 0 <= dropout < 1"
        )
    if has_adapters(backbone):
        raise UsageError("the backbone has adapters already: they stay attached over all tasks")
    targets = resolve_targets(backbone, target_modules)
    _inject(backbone, targets, r, alpha, dropout, seed)
    unfit = _unfit(backbone, targets)
    if unfit:
        if target_modules is not None or len(unfit) == len(targets):
            raise UsageError(
                f"model.lora.target_modules: {backbone.source} does not run with an adapter on {_summary(unfit)}; leave "
                "it out, or set model.use_lora=false"
            )
        logger.warning("%s: no adapter on %s, with which the network does not run", backbone.source, _summary(unfit))
    if target_modules is None and not any(_ends_with(name, ATTENTION) for name in targets):
        logger.warning("%s: no attention projection is called; adapters are on %s", backbone.source, _summary(targets))
    backbone.train(backbone.training)  # the new layers, with their dropout, come in training mode


def _inject(backbone: Backbone, targets: list[str], r: int, alpha: int, dropout: float, seed: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    adapters = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none")
    with seeded(seed):
        inject_adapter_in_model(adapters, backbone.model)
    adapted = {name for name, module in backbone.model.named_modules() if is_adapted(module)}
    assert adapted == set(targets), f"PEFT adapted {adapted ^ set(targets)} besides or not"
    lend_attributes(backbone.model)
    backbone.lora = adapters


def lend_attributes(model: nn.Module) -> None:
    """Give PEFT's layers the attributes of a convolution that networks read of theirs."""
    for layer in model.modules():
        if is_adapted(layer):
            base = layer.get_base_layer()  # type: ignore[operator]
            for name in ("stride", "padding", "dilation", "kernel_size", "groups", "padding_mode"):
                if hasattr(base, name) and not hasattr(layer, name):
                    setattr(layer, name, getattr(base, name))


def _unfit(backbone: Backbone, targets: Sequence[str]) -> list[str]:
    """The adapted layers with which the network does not run: tried all together, and one by one where that fails.

    Their adapters are taken off.
    """
    if backbone.runs():
        return []
    layers, unfit = _adapted_layers(backbone), []
    for name, layer in layers.items():
        _put(backbone, name, layer.get_base_layer())
    for name in targets:
        _put(backbone, name, layers[name])
        if not backbone.runs():
            unfit.append(name)
            _put(backbone, name, layers[name].get_base_layer())
    assert backbone.lora is not None
    backbone.lora.target_modules = [name for name in targets if name not in unfit]
    return unfit


def _put(backbone: Backbone, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(backbone.model.get_submodule(parent), last, module)


def resolve_targets(backbone: Backbone, target_modules: Sequence[str] | None) -> list[str]:
    """Full names, relative to ``backbone.model``, of the layers that get an adapter."""
    called = backbone.called_layers()
    plain = [name for name in called if _takes_adapter(backbone.model.get_submodule(name))]
    if target_modules is None:
        attention = [name for name in plain if _ends_with(name, ATTENTION)]
        # The first layer reads pixels; adapting it moves the features of every image at once.
        found = attention or plain[1:]
        if not found:
            raise UsageError(f"no layer of {backbone.source} can take an adapter: set model.use_lora=false")
        return found
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    targets: set[str] = set()
    for target in wanted:
        matches = _matching(called, target)
        grouped = [name for name in matches if name not in plain]
        if grouped:
            raise UsageError(
                f"model.lora.target_modules: {grouped[0]} (by {target}) is a grouped convolution, or a layer that changes its "
                f"weight before use, which cannot take an adapter; the others are {_summary(plain)}"
            )
        if not matches:
            raise UsageError(
                f"model.lora.target_modules: {target} matches no layer of {backbone.source} that is called; "
                f"its linear and convolution layers are {_summary(plain)}"
            )
        targets.update(matches)
    if not targets:
        raise UsageError(f"model.lora.target_modules is empty; layers of {backbone.source}: {_summary(plain)}")
    return [name for name in called if name in targets]


@torch.no_grad()
def restart_adapters(backbone: Backbone, seed: int | None) -> None:
    """Add every adapter into the weight of its layer, in place, and begin it anew with B = 0: the same function.

    A stays as it is where ``seed`` is None, and is else drawn anew as at attachment.
    """
    for layer in _adapted_layers(backbone).values():
        layer.get_base_layer().weight += layer.get_delta_weight("default")
    with seeded(0 if seed is None else seed):
        for layer in _adapted_layers(backbone).values():
            if seed is not None:
                module = layer.lora_A["default"]
                own = module.weight
                module.weight = nn.Parameter(torch.empty_like(own, device="cpu"))  # drawn there, as at attachment
                layer.reset_lora_parameters("default", True)
                own.copy_(module.weight)
                module.weight = own
            layer.lora_B["default"].weight.zero_()


def merged_weights(backbone: Backbone) -> list[str]:
    """Names within the backbone of the weights that `restart_adapters` changes."""
    return [f"model.{name}.base_layer.weight" for name in _adapted_layers(backbone)]


def adapted_weights(backbone: Backbone) -> dict[str, nn.Parameter]:
    """The weights of the adapted layers, without their adapters, by their names in `merged` (``backbone``)."""
    return {f"model.{name}.weight": layer.get_base_layer().weight for name, layer in _adapted_layers(backbone).items()}


@torch.no_grad()
def effective_weights(backbone: Backbone) -> dict[str, Tensor]:
    """The weights of the adapted layers, W + s B A, by their names in `merged` (``backbone``)."""
    layers = _adapted_layers(backbone)
    return {f"model.{n}.weight": m.get_base_layer().weight + m.get_delta_weight("default") for n, m in layers.items()}


@dataclass(frozen=True)
class Adapter:
    """The pair of matrices of one adapted layer: its weight is W + s B A (a convolution's as matrices o x i k k)."""

    a: nn.Parameter  # (r, i), whole or a shard; (r, i, k, k) of a convolution
    b: nn.Parameter  # (o, r); (o, r, 1, 1)

    def add_gradients(self, of_a: Tensor, of_b: Tensor) -> None:
        """Add whole gradients (r, i) and (o, r) to those of A and B, which may be shards or frozen."""
        for parameter, change in ((self.a, of_a), (self.b, of_b)):
            if parameter.requires_grad:
                add_gradient(parameter, change.view(parameter.shape))


def matrices(adapters: Mapping[str, Adapter]) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, i) and B (o, r) of each, whole: one all-gather where they are shards."""
    whole = iter(gathered([p for adapter in adapters.values() for p in (adapter.a, adapter.b)]))
    return {name: (next(whole).flatten(1), next(whole).flatten(1)) for name in adapters}


@torch.no_grad()
def add_gradient(parameter: nn.Parameter, change: Tensor, times: float = 1.0) -> None:
    """Add ``times`` ``change``, whole, to the gradient of a parameter that may be a shard: no communication."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    if isinstance(parameter, DTensor):
        mine = distribute_tensor(change, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.grad.to_local().add_(mine.to_local(), alpha=times)  # type: ignore[attr-defined]
    else:
        parameter.grad.add_(change.to(parameter.dtype), alpha=times)


def adapters_of(backbone: nn.Module) -> dict[str, Adapter]:
    """The adapters of ``backbone`` whose B is trained, by the name of their layer; A may be frozen."""
    parameters = dict(backbone.named_parameters())
    found = {}
    for name, b in parameters.items():
        layer, mark, _ = name.partition(".lora_B.")
        if mark and b.requires_grad:
            found[layer] = Adapter(parameters[name.replace(".lora_B.", ".lora_A.")], b)
    return found


def is_adapted(module: nn.Module) -> bool:
    """Whether ``module`` is PEFT's: a layer with an adapter around it."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # none of its classes exists before it is imported
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def scalings(backbone: nn.Module) -> dict[str, float]:
    """The factor s of W + s B A of every adapted layer, by its name within ``backbone``."""
    layers: dict[str, Any] = {n: m for n, m in backbone.named_modules() if is_adapted(m)}
    return {name: float(layer.scaling["default"]) for name, layer in layers.items()}


def _adapted_layers(backbone: Backbone) -> dict[str, Any]:
    """Adapted layers by name within ``backbone.model``."""
    return {name: m for name, m in backbone.model.named_modules() if is_adapted(m)}


def merged(backbone: Backbone) -> Backbone:
    """A copy of ``backbone`` in which the adapters are added into the layers they adapt, and gone."""
    return _without_adapter_layers(backbone, merge=True)


def without_adapters(backbone: Backbone) -> Backbone:
    """A copy of ``backbone`` as it was before the adapters, with the batch-norm statistics it has now."""
    return _without_adapter_layers(backbone, merge=False)


def _without_adapter_layers(backbone: Backbone, merge: bool) -> Backbone:
    result = copy.deepcopy(backbone)
    for name, module in list(result.model.named_modules()):
        if is_adapted(module):
            if merge:
                module.merge(safe_merge=True)
            _put(result, name, module.get_base_layer())
    result.lora = None
    return result


def _matching(names: Iterable[str], target: str) -> list[str]:
    """Names that end in ``target``, else in what transformers calls it now, else in what it once did."""
    names = list(names)
    found = [name for name in names if _ends_with(name, (target,))]
    if found or re.search(r"\d", target):  # a numbered layer is named exactly, or not at all
        return found
    for table in (RENAMED, FORMER):
        for known, others in table.items():
            if _ends_with(target, (known,)):
                found = [name for name in names if _ends_with(name, others)]
                if found:
                    return found
    return []


def _ends_with(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _takes_adapter(layer: nn.Module) -> bool:
    """Whether W + s B A is the layer with its adapter: one group, and the weight is used as it is (BiT's is normalised)."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and type(layer).forward is nn.Conv2d.forward
    return type(layer).forward is nn.Linear.forward


def _summary(names: Sequence[str], limit: int = 24) -> str:
    """``layers.*.attention.q_proj (12), ...``: the layers by kind, with their numbers."""
    kinds = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)
    listed = [f"{kind} ({count})" if count > 1 else kind for kind, count in kinds.items()]
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more kinds" if len(listed) > limit else "")
