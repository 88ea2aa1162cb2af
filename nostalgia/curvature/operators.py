"""Hessian and generalised Gauss-Newton of a mean loss, as products with vectors spread over ranks.

    H v   = (1/N) sum_r sum_b  grad( grad(loss_sum_b) . v )          HessianOperator
    G v   = (1/N) sum_r sum_b  J_b^T  [d^2 loss_b / d logits^2]  J_b v    GGNOperator

over the batches b of all ranks r, N samples in all: weighted by samples, so unequal batches, unequal shares and an
empty share are exact. A product gathers v (one all-gather of P numbers), does this rank's share, and sums the result
to the ranks' slices (one reduce-scatter of P numbers); nothing else is communicated.

The network is seen through a skeleton and `torch.func.functional_call`, on detached values of the parameters: mode,
``requires_grad``, gradients and buffers of the model itself are never touched, and FSDP2, whose hooks do not survive a
double backward, is out of the way. Under FSDP2 the whole parameters are gathered once for an operator.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from hessian_eigenthings.operators.base import CurvatureOperator
from torch import Tensor, nn
from torch.func import functional_call

from nostalgia.curvature.context import GraphMeter, free_bytes, move, parameter_dtype, product_context
from nostalgia.curvature.finite_difference import ShardedGradient, central_difference, choose_step
from nostalgia.errors import UsageError
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.parallel.modules import full_parameters, inner_module, is_sharded, skeleton

Values = tuple[Tensor, ...]
Parameters = Mapping[str, nn.Parameter] | Iterable[nn.Parameter] | None

METHODS = ("exact", "jvp", "finite_difference")
RETAINED_SHARE = 0.5  # of the free memory that `retain_graph="auto"` may fill with graphs


class _Call(nn.Module):
    """Hands the skeleton to the user's function as an ordinary model, under `functional_call`."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Any) -> Any:
        return self.function(self.model, batch)


class BatchedOperator(CurvatureOperator):
    """What the operators share: parameters in scope, batches, the sum over samples and ranks."""

    def __init__(
        self,
        model: nn.Module,
        function: Callable[[nn.Module, Any], Any],
        batches: Iterable[Any],
        parameters: Parameters = None,
        accelerator: Accelerator | None = None,
        *,
        method: str = "exact",
        precision: str = "float32",
        retain_graph: str | bool = "auto",
        compile: bool = False,
        space: VectorSpace | None = None,
    ) -> None:
        if method not in METHODS:
            raise UsageError(f"method={method!r}: allowed are {', '.join(METHODS)}")
        if retain_graph not in ("auto", True, False):
            raise UsageError(f"retain_graph={retain_graph!r}: allowed are auto, true, false")
        self.model, self.batches, self.method, self.precision = model, batches, method, precision
        scope = parameters_in_scope(model, parameters)
        self.names = tuple(scope)
        first = next(iter(scope.values()))
        self.value_dtype = parameter_dtype(precision, first.dtype)
        self._device = accelerator.device if accelerator is not None else first.device
        self.space = space or VectorSpace.of(scope, dtype=self.value_dtype, device=self._device)
        self.retain_graph, self.compile = retain_graph, compile
        self.retained = 0  # batches whose first-backward graph is kept
        self._call = _Call(skeleton(model), function).eval()
        self._function = function
        self.refresh()

    @property
    def size(self) -> int:
        """P, over all ranks; a vector of this rank has ``space.local_size`` numbers."""
        return self.space.size

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return self.space.dtype

    def refresh(self) -> None:
        """Take the model's present parameters (a collective under FSDP2); they stand still until the next call."""
        self._graphs: dict[int, Any] = {}
        self._num_samples: int | None = None
        self._compiled: Callable[..., Any] | None = None
        self.retained = 0
        values = {name: move(t, self._device, self.value_dtype) for name, t in self._full_parameters().items()}
        scope = set(self.names)
        self._constants = {f"model.{name}": t for name, t in values.items() if name not in scope}
        self._theta: Values = tuple(values[name].detach().requires_grad_() for name in self.names)

    @torch.no_grad()
    def matvec(self, v: Tensor) -> Tensor:
        """The product with v (P_local,): two collectives of P numbers, none besides (the first counts samples)."""
        if v.shape != (self.space.local_size,):
            raise UsageError(f"a vector of shape {tuple(v.shape)}; expected ({self.space.local_size},)")
        tangents = tuple(t.to(self.value_dtype) for t in self.space.gather(v.to(self.space.dtype)))
        total, samples = self._sum(lambda i, batch: self._product(i, batch, tangents))
        return self.space.scatter(total) / self._count(samples)

    def gradient(self) -> Tensor:
        """Gradient of the mean loss, this rank's part (P_local,)."""
        total, samples = self._sum(self._gradient)
        return self.space.scatter(total) / self._count(samples)

    def loss(self) -> float:
        """The mean loss over all samples of all ranks."""
        total = torch.zeros(2, dtype=torch.float64, device=self._device)
        with torch.no_grad(), product_context(self.precision, self._device):
            for batch in self.batches:
                loss, samples = self._loss(self._theta, self._move(batch))
                total += torch.stack([loss.double(), torch.as_tensor(float(samples), device=self._device).double()])
        loss, samples = self.space.all_reduce(total).tolist()
        if samples == 0:
            raise UsageError(NO_SAMPLES)
        return loss / samples

    # -- for the kinds of operator ---------------------------------------------------------------------------------

    @abstractmethod
    def _product(self, index: int, batch: Any, tangents: Values) -> tuple[Values, int]:
        """Sum over the samples of one batch of (curvature of a sample) v, and their number."""

    @abstractmethod
    def _loss(self, theta: Values, batch: Any) -> tuple[Tensor, int]:
        """Summed loss of a batch at parameters ``theta``, and its number of samples."""

    def _evaluate(self, theta: Values, batch: Any) -> Any:
        """The user's function at parameters ``theta``."""
        scope = {f"model.{name}": value for name, value in zip(self.names, theta, strict=True)}
        return functional_call(self._call, {**self._constants, **scope}, (batch,), strict=False)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _full_parameters(self) -> dict[str, Tensor]:
        return full_parameters(self.model)

    def _move(self, batch: Any) -> Any:
        return move(batch, self._device, self.value_dtype)

    def _sum(self, each: Callable[[int, Any], tuple[Values, int]]) -> tuple[list[Tensor], int]:
        """Sum ``each`` over this rank's batches; an empty share sums to zero."""
        total = [torch.zeros_like(t) for t in self._theta]
        samples = 0
        with product_context(self.precision, self._device):
            for index, batch in enumerate(self.batches):
                part, number = each(index, batch)
                torch._foreach_add_(total, [p.detach().to(t.dtype) for p, t in zip(part, total, strict=True)])
                samples += int(number)
        return total, samples

    def _count(self, samples: int) -> int:
        """N over all ranks; counted at the first product, constant after."""
        if self._num_samples is None:
            number = torch.tensor([samples], dtype=torch.float64, device=self._device)
            self._num_samples = int(self.space.all_reduce(number))
            if self._num_samples == 0:
                raise UsageError(NO_SAMPLES)
        return self._num_samples

    @torch.enable_grad()
    def _gradient(self, index: int, batch: Any, theta: Values | None = None) -> tuple[Values, int]:
        theta = self._theta if theta is None else theta
        loss, samples = self._loss(theta, self._move(batch))
        return torch.autograd.grad(loss, theta, allow_unused=True, materialize_grads=True), samples

    def _retaining(self, index: int, build: Callable[[], Any]) -> Any:
        """What ``build`` makes for a batch: its autograd graph, kept for later products while memory allows."""
        if index in self._graphs:
            return self._graphs[index]
        meter = GraphMeter()
        measure = self.retain_graph == "auto" and index == 0
        if measure:
            with meter.active():
                graph = build()
            self._budget = int(RETAINED_SHARE * free_bytes(self._device) / max(1, meter.bytes))
        else:
            graph = build()
        keep = self.retain_graph is True or (self.retain_graph == "auto" and self.retained < self._budget)
        if keep:
            self._graphs[index] = graph
            self.retained += 1
        return graph


NO_SAMPLES = "the curvature set is empty on every rank: nothing to take a curvature of; give nostalgia.num_samples >= 1"


class HessianOperator(BatchedOperator):
    """Hessian of the mean loss.

    ``loss_fn(model, batch) -> (loss_sum, num_samples)``: the loss summed over a batch's samples, and their number.
    ``batches`` is this rank's share, re-iterable in the same order, possibly empty. ``parameters`` (mapping or
    iterable of the model's own, default all that require a gradient) are the variables; all others are constants.
    ``model`` may be bare, under DDP, sharded by FSDP2, or prepared by Accelerate.

    ``method``: ``exact`` differentiates the gradient's graph once more (kept for as many batches as memory allows,
    ``retain_graph``); ``jvp`` is forward over reverse, by choice compiled; ``finite_difference`` takes central
    differences of two gradients, checks itself by halving its step, and needs no gathered parameters under FSDP2.
    ``precision`` of the network in a product: ``float32``, ``float64``, ``tf32``, ``bf16``.

    Raises UsageError for parameters that are not the model's, and for a curvature set empty on all ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[nn.Module, Any], tuple[Tensor, int]],
        batches: Iterable[Any],
        parameters: Parameters = None,
        accelerator: Accelerator | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, loss_fn, batches, parameters, accelerator, **options)

    def _loss(self, theta: Values, batch: Any) -> tuple[Tensor, int]:
        return self._evaluate(theta, batch)

    def _product(self, index: int, batch: Any, tangents: Values) -> tuple[Values, int]:
        if self.method == "jvp":
            return self._forward_over_reverse(batch, tangents)
        gradients, samples = self._retaining(index, lambda: self._gradient_graph(batch))
        return _differentiate(gradients, self._theta, tangents), samples

    @torch.enable_grad()
    def _gradient_graph(self, batch: Any) -> tuple[Values, int]:
        loss, samples = self._loss(self._theta, self._move(batch))
        gradients = torch.autograd.grad(
            loss, self._theta, create_graph=True, allow_unused=True, materialize_grads=True
        )
        return gradients, samples

    def _forward_over_reverse(self, batch: Any, tangents: Values) -> tuple[Values, int]:
        if self._compiled is None:

            def product(theta: Values, tangents: Values, batch: Any) -> tuple[Values, int]:
                counted: list[int] = []

                def loss(values: Values) -> Tensor:
                    total, samples = self._loss(values, batch)
                    counted.append(samples)
                    return total

                _, result = torch.func.jvp(torch.func.grad(loss), (theta,), (tangents,))
                return result, counted[-1]

            self._compiled = torch.compile(product) if self.compile else product
        theta = tuple(t.detach() for t in self._theta)
        return self._compiled(theta, tangents, self._move(batch))

    # -- finite differences ----------------------------------------------------------------------------------------

    def _full_parameters(self) -> dict[str, Tensor]:
        if self.method == "finite_difference" and is_sharded(self.model):
            return {}
        return super()._full_parameters()

    def refresh(self) -> None:
        self._step: float | None = None
        self.estimated_error: float | None = None  # of a finite difference, relative, from halving the step
        if self.method == "finite_difference" and is_sharded(self.model):
            self._num_samples = None
            scope = parameters_in_scope(self.model, self.names_to_parameters())
            self._sharded = ShardedGradient(
                self.model, self._function, self.batches, list(scope.values()), self.space, self._move, self.precision
            )
            return
        self._sharded = None
        super().refresh()

    def names_to_parameters(self) -> dict[str, nn.Parameter]:
        own = dict(inner_module(self.model).named_parameters())
        return {name: own[name] for name in self.names}

    def matvec(self, v: Tensor) -> Tensor:
        if self.method != "finite_difference":
            return super().matvec(v)
        if self._step is None:
            self._step, self.estimated_error = choose_step(self._gradient_at, v, self.space, self._parameter_norm())
        return central_difference(self._gradient_at, v, self.space, self._step)

    def gradient(self) -> Tensor:
        return self._sharded.at(None) if self._sharded is not None else super().gradient()

    def loss(self) -> float:
        return self._sharded.loss() if self._sharded is not None else super().loss()

    def _parameter_norm(self) -> float:
        values = [p.detach() for p in self.names_to_parameters().values()]
        return float(self.space.norm(self.space.take(values)))

    def _gradient_at(self, displacement: Tensor) -> Tensor:
        """Mean gradient (P_local,) at the parameters moved by ``displacement`` (P_local,)."""
        if self._sharded is not None:
            return self._sharded.at(displacement)
        moves = self.space.gather(displacement)
        theta = tuple(
            (t.detach() + d.to(t.dtype)).requires_grad_() for t, d in zip(self._theta, moves, strict=True)
        )
        total, samples = self._sum(lambda i, batch: self._gradient(i, batch, theta))
        return self.space.scatter(total) / self._count(samples)


class GGNOperator(BatchedOperator):
    """Generalised Gauss-Newton matrix of the mean loss: positive semi-definite, without the network's own curvature.

    ``forward_fn(model, batch) -> (logits, targets)``: logits (B, C). ``loss``: ``cross_entropy`` (softmax, curvature
    diag(p) - p p^T a sample) or ``mse`` (squared error summed over outputs, curvature 2 I). The rest as for
    `HessianOperator`; ``method`` is ``exact`` (both products on one retained graph) or ``jvp``.
    """

    LOSSES = ("cross_entropy", "mse")

    def __init__(
        self,
        model: nn.Module,
        forward_fn: Callable[[nn.Module, Any], tuple[Tensor, Tensor]],
        batches: Iterable[Any],
        parameters: Parameters = None,
        accelerator: Accelerator | None = None,
        loss: str = "cross_entropy",
        **options: Any,
    ) -> None:
        if loss not in self.LOSSES:
            raise UsageError(f"loss={loss!r}: allowed are {', '.join(self.LOSSES)}")
        if options.get("method") == "finite_difference":
            raise UsageError("method=finite_difference is for the Hessian; the GGN allows exact and jvp")
        self.loss_name = loss
        super().__init__(model, forward_fn, batches, parameters, accelerator, **options)

    def _loss(self, theta: Values, batch: Any) -> tuple[Tensor, int]:
        logits, targets = self._evaluate(theta, batch)
        if self.loss_name == "mse":
            return (logits - targets).square().sum(), len(logits)
        return F.cross_entropy(logits.to(self.value_dtype), targets, reduction="sum"), len(logits)

    def _product(self, index: int, batch: Any, tangents: Values) -> tuple[Values, int]:
        if self.method == "jvp":
            return self._forward_then_reverse(batch, tangents)
        logits, cotangent, pulled = self._retaining(index, lambda: self._linearise(batch))
        # J v is the derivative of (J^T u) . v with respect to u: one backward through the pull-back's graph.
        (pushed,) = _differentiate(pulled, (cotangent,), tangents)
        curved = self._loss_curvature(logits.detach(), pushed.detach())
        result = torch.autograd.grad(
            logits, self._theta, curved, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return result, len(logits)

    @torch.enable_grad()
    def _linearise(self, batch: Any) -> tuple[Tensor, Tensor, Values]:
        logits, _ = self._evaluate(self._theta, self._move(batch))
        cotangent = torch.zeros_like(logits, requires_grad=True)
        pulled = torch.autograd.grad(
            logits, self._theta, cotangent, create_graph=True, allow_unused=True, materialize_grads=True
        )
        return logits, cotangent, pulled

    def _forward_then_reverse(self, batch: Any, tangents: Values) -> tuple[Values, int]:
        if self._compiled is None:

            def product(theta: Values, tangents: Values, batch: Any) -> tuple[Values, Tensor]:
                def logits_of(values: Values) -> Tensor:
                    return self._evaluate(values, batch)[0]

                logits, pull = torch.func.vjp(logits_of, theta)
                _, pushed = torch.func.jvp(logits_of, (theta,), (tangents,))
                return pull(self._loss_curvature(logits, pushed))[0], logits

            self._compiled = torch.compile(product) if self.compile else product
        theta = tuple(t.detach() for t in self._theta)
        result, logits = self._compiled(theta, tangents, self._move(batch))
        return result, len(logits)

    def _loss_curvature(self, logits: Tensor, pushed: Tensor) -> Tensor:
        """Second derivative of the loss in the logits, times ``pushed`` (B, C)."""
        if self.loss_name == "mse":
            return 2 * pushed
        p = logits.to(self.value_dtype).softmax(dim=1)
        pushed = pushed.to(self.value_dtype)
        return (p * pushed - p * (p * pushed).sum(dim=1, keepdim=True)).to(logits.dtype)


def parameters_in_scope(model: nn.Module, parameters: Parameters) -> dict[str, nn.Parameter]:
    """Names within the unwrapped model of the parameters given, in the order given."""
    own = dict(inner_module(model).named_parameters())
    if parameters is None:
        chosen = {name: p for name, p in own.items() if p.requires_grad}
    else:
        given = list(parameters.values() if isinstance(parameters, Mapping) else parameters)
        names = {id(p): name for name, p in own.items()}
        strangers = [tuple(p.shape) for p in given if id(p) not in names]
        if strangers:
            raise UsageError(
                f"{len(strangers)} parameters (the first of shape {strangers[0]}) do not belong to the model; "
                "take them from the model as it is now (wrapping by FSDP2 replaces them)"
            )
        chosen = {names[id(p)]: p for p in given}
    if not chosen:
        raise UsageError("no parameters: there is nothing to take the curvature of; check requires_grad")
    return chosen


def _differentiate(outputs: Values, inputs: Values, tangents: Values) -> Values:
    """Derivative of sum_i outputs_i . tangents_i in ``inputs``, zero where nothing depends on them; the graph stays."""
    pairs = [(o, t) for o, t in zip(outputs, tangents, strict=True) if o.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(i) for i in inputs)
    with torch.enable_grad():
        return torch.autograd.grad(
            [o for o, _ in pairs],
            inputs,
            [t.to(o.dtype) for o, t in pairs],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
