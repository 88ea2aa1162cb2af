"""What curvature operators share: the parameters in scope, and the sum over samples, batches and ranks.

    C v = (1/N) sum_r sum_b C_b v

over the batches b of all ranks r, with C_b the curvature of a batch's *summed* loss and N the samples in all:
weighted by samples, so unequal batches, unequal shares and an empty share are exact. A product gathers v (one
all-gather of P numbers), does this rank's share, and sums the result to the ranks' slices (one reduce-scatter of
P numbers); nothing else is communicated.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from hessian_eigenthings.operators.base import CurvatureOperator
from torch import Tensor, nn

from nostalgia.curvature.batches import to_device
from nostalgia.curvature.context import fix_randomness, product_context, value_dtype
from nostalgia.curvature.network import Network, Values
from nostalgia.curvature.retention import GraphCache
from nostalgia.errors import RunFailedError, UsageError
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.parallel.modules import named_parameters

Parameters = Mapping[str, nn.Parameter] | Iterable[nn.Parameter] | None


class BatchedOperator(CurvatureOperator):
    """Curvature of a mean loss; `HessianOperator` says what the arguments mean."""

    METHODS: ClassVar[tuple[str, ...]] = ("exact", "jvp")
    _compiler: Mapping[str, Any] = MappingProxyType({})  # arguments of torch.compile

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
        if method not in self.METHODS:
            raise UsageError(f"method={method!r}: allowed are {', '.join(self.METHODS)}")
        if compile and method != "jvp":
            raise UsageError(f"compile=True compiles method='jvp'; it is {method!r}")
        if isinstance(batches, Iterator):
            raise UsageError("batches is an iterator, gone after one product; give a list or a data loader")
        self.model, self.batches, self.function = model, batches, function
        self.method, self.precision, self.compile = method, precision, compile
        self.parameters = parameters_in_scope(model, parameters)
        self.names = tuple(self.parameters)
        first = next(iter(self.parameters.values()))
        self.value_dtype = value_dtype(precision, first.dtype)
        self._device = accelerator.device if accelerator is not None else first.device
        self.space = space or VectorSpace.of(self.parameters, dtype=self.value_dtype, device=self._device)
        if self.space.shapes != tuple(p.shape for p in self.parameters.values()):
            raise UsageError("space is not that of the parameters: build it by VectorSpace.of(parameters)")
        self.products = 0
        self._graphs: GraphCache[Any] = GraphCache(retain_graph, self._device)
        self._compiled: Callable[..., Any] | None = None
        self._seen: Network | None = None
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

    @property
    def retained(self) -> int:
        """Batches of this rank whose graph is kept from product to product."""
        return len(self._graphs)

    @property
    def num_samples(self) -> int:
        """N, over all ranks; the first call is a pass over the batches and a small all-reduce."""
        return self._measured()[1]

    def refresh(self) -> None:
        """Take the model's present parameters (a gather under FSDP2): products are at these until the next call."""
        self._graphs.clear()
        self._totals: tuple[float, int] | None = None
        self._take_values()

    @torch.no_grad()
    def matvec(self, v: Tensor) -> Tensor:
        """The product with v (P_local,): two collectives of P numbers; the very first product counts samples too.

        Raises RunFailedError, on every rank, for a product that is not finite (where some rank holds no part of
        the vectors it is returned as it is, for no rank may raise alone).
        """
        samples = self._checked(v)
        self.products += 1
        tangents = self._tangents(v)
        return self._mean(lambda index, batch: self._product(index, batch, tangents), samples)

    @torch.no_grad()
    def gradient(self) -> Tensor:
        """Gradient of the mean loss, this rank's part (P_local,)."""
        samples = self._checked()
        return self._mean(lambda index, batch: self._gradient(batch, self._network.theta), samples, "the gradient")

    def loss(self) -> float:
        """The mean loss over all samples of all ranks."""
        total, samples = self._measured()
        return total / samples

    # -- for the kinds of operator ---------------------------------------------------------------------------------

    @abstractmethod
    def _product(self, index: int, batch: Any, tangents: Values) -> Sequence[Tensor]:
        """Curvature of the summed loss of batch number ``index`` times v; both in parameter shape."""

    @abstractmethod
    def _loss(self, theta: Values, batch: Any) -> tuple[Tensor, int]:
        """Summed loss of a batch (0-dim) at parameters ``theta``, and its number of samples."""

    # -- inside ----------------------------------------------------------------------------------------------------

    def _take_values(self) -> None:
        if self._seen is None:
            self._seen = Network(self.model, self.function, self.names, self._device, self.value_dtype)
        else:
            self._seen.take(self.model)
        self._graphs.share(self._seen.theta)

    @property
    def _network(self) -> Network:
        assert self._seen is not None, "finite differences of a sharded model see no whole parameters"
        return self._seen

    def _maybe_compiled(self, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        if self._compiled is None:
            # Static shapes: one program for full batches and one for a short last one, both at full speed.
            self._compiled = torch.compile(make(), dynamic=False, **self._compiler) if self.compile else make()
        return self._compiled

    def _checked(self, v: Tensor | None = None) -> int:
        """N, once it is sure that a product means what the caller thinks."""
        if v is not None and v.shape != (self.space.local_size,):
            raise UsageError(f"a vector of shape {tuple(v.shape)}; expected is ({self.space.local_size},)")
        if not self._is_current():
            raise UsageError("the model's parameters changed since the operator took them: call operator.refresh()")
        return self.num_samples

    def _is_current(self) -> bool:
        return self._network.is_current(self.model)

    def _tangents(self, v: Tensor) -> Values:
        return tuple(t.to(self.value_dtype) for t in self.space.gather(v.to(self.space.dtype)))

    def _batch(self, batch: Any) -> Any:
        return to_device(batch, self._device, self.value_dtype)

    def _mean(self, each: Callable[[int, Any], Sequence[Tensor]], samples: int, what: str = "") -> Tensor:
        """1/N times the sum of ``each`` over all batches of all ranks: this rank's part (P_local,)."""
        total = [torch.zeros_like(t) for t in self._network.theta]  # what an empty share gives
        with product_context(self.precision, self._device):
            for index, batch in enumerate(self.batches):
                fix_randomness(index, self._device)
                torch._foreach_add_(total, [part.detach() for part in each(index, batch)])
        sums = torch.stack([t.sum() for t in total])
        # All ranks must fail together: what is not finite anywhere becomes NaN in every rank's slice.
        torch._foreach_add_(total, sums.sum() * 0.0)
        result = self.space.scatter(total).div_(samples)
        if min(self.space.layout.local_sizes) > 0 and not bool(torch.isfinite(result).all()):
            raise RunFailedError(self._not_finite(what or f"curvature product {self.products}", sums))
        return result

    def _not_finite(self, what: str, sums: Tensor) -> str:
        bad = [name for name, value in zip(self.names, sums.tolist(), strict=True) if not math.isfinite(value)]
        where = f"first in {bad[0]}" if bad else "on another rank"
        return (
            f"{what} is not finite ({where}; the mean loss is {self.loss():.3g}): a derivative overflows at these "
            "parameters; try curvature.precision=float64 or a smaller train.lr"
        )

    def _measured(self) -> tuple[float, int]:
        """Summed loss and samples over all ranks; one pass and one small all-reduce the first time."""
        if self._totals is None:
            sums = torch.tensor(self._measure(), dtype=torch.float64, device=self._device)
            loss, samples = self.space.all_reduce(sums).tolist()
            if samples == 0:
                raise UsageError(
                    "the curvature set is empty on every rank: nothing to take a curvature of; "
                    "give curvature.num_samples >= 1"
                )
            if not math.isfinite(loss):
                raise RunFailedError(
                    f"the loss over the curvature set is {loss}: no curvature can be taken at these parameters; "
                    "look for inputs that are not finite, or try a smaller train.lr"
                )
            self._totals = (loss, int(samples))
        return self._totals

    @torch.no_grad()
    def _measure(self) -> tuple[float, int]:
        """Summed loss and samples of this rank's share."""
        total, samples = 0.0, 0
        with product_context(self.precision, self._device):
            for index, batch in enumerate(self.batches):
                fix_randomness(index, self._device)
                loss, number = self._loss(self._network.theta, self._batch(batch))
                if loss.numel() != 1:
                    raise UsageError(f"the loss has shape {tuple(loss.shape)}: return its sum over the samples")
                total, samples = total + float(loss), samples + int(number)
        return total, samples

    @torch.enable_grad()
    def _gradient(self, batch: Any, theta: Values, create_graph: bool = False) -> Values:
        """Gradient of a batch's summed loss; zero for parameters the loss does not reach."""
        loss, _ = self._loss(theta, self._batch(batch))
        if not loss.requires_grad:
            return tuple(torch.zeros_like(t) for t in theta)
        return torch.autograd.grad(loss, theta, create_graph=create_graph, allow_unused=True, materialize_grads=True)


def differentiate(outputs: Values, inputs: Values, weights: Values, retain_graph: bool) -> Values:
    """Derivative of sum_i outputs_i . weights_i in ``inputs``, zero where nothing depends on them."""
    pairs = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(i) for i in inputs)
    return torch.autograd.grad(
        [o for o, _ in pairs],
        inputs,
        [w.to(o.dtype) for o, w in pairs],
        retain_graph=retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )


def parameters_in_scope(model: nn.Module, parameters: Parameters) -> dict[str, nn.Parameter]:
    """The parameters given (all that require a gradient if none are), by name in the unwrapped model."""
    own = named_parameters(model)
    if parameters is None:
        chosen = {name: p for name, p in own.items() if p.requires_grad}
    else:
        given = list(parameters.values() if isinstance(parameters, Mapping) else parameters)
        names = {id(p): name for name, p in own.items()}
        unknown = [tuple(p.shape) for p in given if id(p) not in names]
        if unknown:
            raise UsageError(
                f"{len(unknown)} of {len(given)} parameters (the first of shape {unknown[0]}) are not the "
                "model's; take them from the model as it is now (wrapping by FSDP2 replaces them)"
            )
        chosen = {names[id(p)]: p for p in given}
    if not chosen:
        raise UsageError("no parameters: there is nothing to take the curvature of; check requires_grad")
    return chosen
