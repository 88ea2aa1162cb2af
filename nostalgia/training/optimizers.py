"""The optimizers of a run, each made in one place that says what it takes and in which metric it steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from nostalgia.errors import UsageError
from nostalgia.projection.metric import METRICS, identity


class Lion(Optimizer):
    """theta <- (1 - lr wd) theta - lr sign(b1 m + (1 - b1) g), then m <- b2 m + (1 - b2) g.

    Chen et al. 2023, https://arxiv.org/abs/2302.06675, algorithm 2; torch has none. All coordinates move by lr: its metric is
    the identity. A third to a tenth of AdamW's learning rate is usual. One state a parameter, ``exp_avg``.
    """

    diagonal_metric = staticmethod(identity)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if closure is not None:
            raise UsageError("Lion takes no closure: compute the gradients before the step")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step(parameters, **{key: group[key] for key in ("lr", "betas", "weight_decay")})
        return None

    def _step(self, parameters: list[Tensor], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        for p in parameters:
            if "exp_avg" not in self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
        gradients = [p.grad for p in parameters if p.grad is not None]
        moments: list[Tensor] = [self.state[p]["exp_avg"] for p in parameters]
        direction = torch._foreach_lerp(moments, gradients, 1 - betas[0])
        torch._foreach_sign_(direction)
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        torch._foreach_add_(parameters, direction, alpha=-lr)
        torch._foreach_lerp_(moments, gradients, 1 - betas[1])


@dataclass(frozen=True)
class OptimizerKind:
    """One choice of ``train.optimizer``: its class, the options of `Optimization` that it takes, and what it costs."""

    make: type[Optimizer]
    options: tuple[str, ...]  # beside lr and weight_decay
    states: int  # numbers kept a parameter, rounded
    sharded: bool = True  # works on FSDP2's shards
    fused_on_cpu: bool = False  # one kernel for all parameters; on a GPU torch has its own choice, and gradient scaling
    foreach: bool = False  # takes ``foreach``

    @property
    def metric_known(self) -> bool:
        """Whether a constrained step can be taken with it."""
        return self.make in METRICS or hasattr(self.make, "diagonal_metric")


# Adafactor (Shazeer and Stern 2018) keeps second moments by row and column and scales each step by the size of its tensor: no
# diagonal metric is declared, and what it keeps of a matrix is of the whole one.
OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(AdamW, ("betas",), states=2, fused_on_cpu=True, foreach=True),
    "sgd": OptimizerKind(SGD, ("momentum",), states=1, foreach=True),  # fused, it knows no shards (torch 2.14)
    "lion": OptimizerKind(Lion, ("betas",), states=1),
    "adafactor": OptimizerKind(Adafactor, (), states=0, sharded=False),
}


def make_optimizer(model: nn.Module, name: str, options: Mapping[str, Any]) -> Optimizer:
    """The optimizer ``name`` over the parameters that require a gradient; takes its own of ``options``.

    ``options["head_lr"]``, where given, is the rate of those called ``heads.*``, in a group of their own.
    """
    kind = OPTIMIZERS[name]
    taken = {key: options[key] for key in ("lr", "weight_decay", *kind.options)}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(trained.values())
    if kind.fused_on_cpu and all(p.device.type == "cpu" for p in parameters):
        taken["fused"] = True
    elif kind.foreach and any(isinstance(p, DTensor) for p in parameters):
        taken["foreach"] = True  # by themselves torch's would go through shards one by one
    heads = [p for name, p in trained.items() if name.startswith("heads.")]
    backbone = [p for name, p in trained.items() if not name.startswith("heads.")]
    groups = [{"params": backbone}, {"params": heads, "lr": options.get("head_lr") or taken["lr"]}]
    return kind.make([group for group in groups if group["params"]], **taken)


def check_optimizer(name: str, *, needs_metric: bool = False, sharded: bool = False) -> None:
    """Raise UsageError for an optimizer that cannot take a method's constrained steps, or train FSDP2's shards."""
    kind = OPTIMIZERS[name]
    if needs_metric and not kind.metric_known:
        known = ", ".join(other for other, item in OPTIMIZERS.items() if item.metric_known)
        raise UsageError(
            f"train.optimizer={name} with method.project=constrained: its metric is not known; allowed are {known}, or "
            "another method.project, such as displacement"
        )
    if sharded and not kind.sharded:
        able = ", ".join(other for other, item in OPTIMIZERS.items() if item.sharded)
        raise UsageError(
            f"train.optimizer={name} with FSDP2: it needs whole matrices; allowed are {able}, or start without FSDP2"
        )
