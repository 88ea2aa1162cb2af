"""Kronecker-factored curvature of each layer, in weight space: the Gauss-Newton matrix with all of its spectrum.

    A_l = 1/(n T) sum over samples and tokens of x x^T     (i, i), x the input of layer l
    G_l = 1/n     sum over samples and tokens of g g^T     (o, o), g = d(u . z)/d(output of l), z the network's outputs

with u drawn per sample, E u u^T = M the output metric: diag(p) - p p^T for cross-entropy with p = softmax(z / temperature),
2 I for squared error. The layer's curvature in its weight W is then G_l (x) A_l: tr(G D A D^T) is its quadratic form
(Martens and Grosse 2015; with the tokens of a layer as in Eschenhagen et al. 2023, "expand"). Convolutions take the patches
they see. Parameters that are no weight of such a layer (biases, norms, embeddings) have a diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nostalgia.curvature.base import Parameters, parameters_in_scope
from nostalgia.curvature.batches import map_tensors, rows_of, tensors_of, to_device
from nostalgia.curvature.context import fix_randomness, product_context, value_dtype
from nostalgia.curvature.cotangents import OutputMetric, sample_numbers
from nostalgia.curvature.layers import (
    Layer,
    Pass,
    find_layers,
    input_rows,
    output_gradients,
    output_rows,
    recorded,
    weight_of,
)
from nostalgia.curvature.network import Network
from nostalgia.curvature.sample_gradients import layers_by_formula
from nostalgia.errors import RunFailedError, UsageError
from nostalgia.linalg.vector_space import VectorSpace

GRADIENT_BYTES = 2**28  # of single samples' gradients in the parameters that no layer holds, at a time


@dataclass(frozen=True)
class LayerFactors:
    """One layer's factors. ``parameters`` are its weight, or its adapter's A and B, by the names they were given under."""

    name: str
    inputs: Tensor  # A_l (i, i)
    outputs: Tensor  # G_l (o, o)
    parameters: tuple[str, ...]
    scaling: float | None = None  # s of W + s B A; None: the weight itself

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.inputs, self.outputs))


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """Curvature by layers, the same on all ranks; an operator on the vectors of ``space`` (block-diagonal).

    ``values`` are the parameters it was taken at, whole, by name: the block of an adapter depends on them.
    """

    layers: tuple[LayerFactors, ...]
    diagonal: dict[str, Tensor]  # of every other parameter in scope, in its shape
    values: dict[str, Tensor]
    space: VectorSpace
    num_samples: int
    temperature: float = 1.0  # of the output metric: at another one than 1 it is not the loss's curvature

    @property
    def num_bytes(self) -> int:
        return sum(layer.num_bytes for layer in self.layers) + sum(
            d.numel() * d.element_size() for d in self.diagonal.values()
        )

    @property
    def size(self) -> int:
        return self.space.size

    @torch.no_grad()
    def matvec(self, v: Tensor) -> Tensor:
        """The product with v (P_local,): this rank's part; one all-gather. For an adapter J^T (G (x) A) J, J the
        Jacobian of s B A in (A, B)."""
        parts = dict(zip(self.space.names, self.space.gather(v.to(self.space.dtype)), strict=True))
        result = {name: self.diagonal[name] * parts[name] for name in self.diagonal}
        for layer in self.layers:
            result.update(self._product(layer, parts))
        return self.space.take(result[name].to(self.space.dtype) for name in self.space.names)

    @torch.no_grad()
    def increase(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
        """1/2 sum_l tr(G_l D_l A_l D_l^T) + 1/2 sum_i h_i d_i^2, with D the change of the weights from ``before`` to
        ``after``: whole parameters by name. An adapter's A that is frozen need not be given."""
        before, after = {**self.values, **before}, {**self.values, **after}
        total = sum(
            float((diagonal * (after[name] - before[name]).square()).sum()) for name, diagonal in self.diagonal.items()
        )
        for layer in self.layers:
            if layer.scaling is None:
                change = (after[layer.parameters[0]] - before[layer.parameters[0]]).flatten(1).to(layer.outputs.dtype)
                total += float(((layer.outputs @ change @ layer.inputs) * change).sum())
                continue
            (a0, b0), (a, b) = (
                [values[name].flatten(1).to(layer.outputs.dtype) for name in layer.parameters]
                for values in (before, after)
            )
            form = adapter_form(layer.inputs, layer.outputs, torch.cat([b, -b0], dim=1), torch.cat([a, a0]))
            total += layer.scaling**2 * float(form)
        return 0.5 * total

    def trace(self) -> float:
        """Trace over the parameters in scope, exact for weights and diagonals, and for adapters at ``values``."""
        total = sum(float(d.double().sum()) for d in self.diagonal.values())
        for layer in self.layers:
            inputs, outputs = layer.inputs.double(), layer.outputs.double()
            if layer.scaling is None:
                total += float(inputs.trace() * outputs.trace())
                continue
            a, b = self._adapter(layer)
            a, b = a.double(), b.double()
            through_b = (a @ inputs @ a.T).trace() * outputs.trace() if layer.parameters[-1] in self._names else 0.0
            through_a = (b.T @ outputs @ b).trace() * inputs.trace() if layer.parameters[0] in self._names else 0.0
            total += layer.scaling**2 * float(through_a + through_b)
        return total

    @property
    def _names(self) -> frozenset[str]:
        return frozenset(self.space.names)

    def _adapter(self, layer: LayerFactors) -> tuple[Tensor, Tensor]:
        a, b = (self.values[name].flatten(1) for name in layer.parameters)
        return a, b

    def _product(self, layer: LayerFactors, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        if layer.scaling is None:
            (name,) = layer.parameters
            yield name, (layer.outputs @ parts[name].flatten(1) @ layer.inputs).view(parts[name].shape)
            return
        name_a, name_b = layer.parameters
        a, b = self._adapter(layer)
        left, right = b.new_zeros(b.shape[0], 0), a.new_zeros(0, a.shape[1])  # s (V_B A + B V_A) as a product
        if name_b in parts:
            left, right = torch.cat([left, parts[name_b].flatten(1)], 1), torch.cat([right, a])
        if name_a in parts:
            left, right = torch.cat([left, b], 1), torch.cat([right, parts[name_a].flatten(1)])
        left, right = layer.scaling**2 * (layer.outputs @ left), right @ layer.inputs
        if name_a in parts:
            yield name_a, ((b.T @ left) @ right).view(parts[name_a].shape)
        if name_b in parts:
            yield name_b, (left @ (right @ a.T)).view(parts[name_b].shape)


@torch.no_grad()
def kronecker_factors(
    model: nn.Module,
    forward_fn: Callable[[nn.Module, Any], tuple[Tensor, Tensor]],
    batches: Iterable[Any],
    parameters: Parameters = None,
    accelerator: Accelerator | None = None,
    *,
    draws: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
    loss: str = "cross_entropy",
    exact: bool = False,
    precision: str = "float32",
    space: VectorSpace | None = None,
) -> KroneckerFactors:
    """Kronecker factors of the mean loss over the samples of all ranks.

    ``forward_fn(model, batch) -> (logits, targets)``, logits (B, C), as for `GGNOperator`. ``batches`` is this rank's share
    (shares follow each other in the order of ranks), possibly empty; ``parameters`` (default all that require a gradient)
    as for the operators. ``draws`` output cotangents a sample; ``exact`` takes all columns of a root of M instead.
    ``temperature`` softens p, which keeps samples alive that are already fitted. The model is seen in evaluation mode and
    not touched; under FSDP2 its parameters are gathered for the pass. One pass of ``draws`` backward passes to the layers'
    outputs, one all-reduce. For a seed the result is the same on any number of ranks and batch sizes, to rounding.

    Raises UsageError for settings that cannot work and for no samples; RunFailedError for factors that are not finite.

    Examples:
        >>> import torch
        >>> from nostalgia import KroneckerMemory
        >>> model, batch = torch.nn.Linear(2, 3), (torch.eye(2), torch.tensor([0, 2]))
        >>> factors = kronecker_factors(model, lambda m, b: (m(b[0]), b[1]), [batch])
        >>> factors.layers[0].inputs  # the mean of x x^T
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
        >>> memory = KroneckerMemory(strength=10.0)
        >>> _ = memory.update(factors, dict(model.named_parameters()))
        >>> float(memory.penalty(dict(model.named_parameters())).detach())  # nothing has moved yet
        0.0
    """
    metric = OutputMetric(loss, temperature, draws, seed, exact)
    scope = parameters_in_scope(model, parameters)
    given = _given_names(parameters, scope)
    first = next(iter(scope.values()))
    device = accelerator.device if accelerator is not None else first.device
    dtype = value_dtype(precision, first.dtype)
    network = Network(model, forward_fn, tuple(scope), device, dtype)
    space = space or VectorSpace.of({given[name]: p for name, p in scope.items()}, dtype=dtype, device=device)
    batches = list(batches)
    before, total = sample_numbers(batches, space, "Kronecker factors")
    with product_context(precision, device):
        layers, rest = _layers_with_factors(network, batches, precision, space)
    sums = _Sums(layers, network, rest)
    with product_context(precision, device), recorded({layer.name: layer.module for layer in layers}) as take:
        for index, batch in enumerate(batches):
            fix_randomness(index, device)
            moved = to_device(batch, device, dtype)
            take()
            with torch.enable_grad():
                outputs, targets = network(network.theta, moved)
            passed = Pass(outputs, targets, *take())
            cotangents = metric.cotangents(outputs.detach(), before)
            before += len(outputs)
            sums.add(passed, cotangents)
            sums.add_rest(moved, cotangents, exact)
    return replace(sums.finish(total, given, space), temperature=temperature)


def _layers_with_factors(
    network: Network, batches: list[Any], precision: str, space: VectorSpace
) -> tuple[list[Layer], list[str]]:
    """The layers whose gradient is sum_t g_t x_t^T on every rank's first samples, and the parameters of no such layer."""
    found, rest = find_layers(network)
    odd = torch.zeros(len(found), dtype=torch.float64, device=space.device)
    if batches:
        fix_randomness(0, network.device)
        first = to_device(rows_of(batches[0], 0, 2), network.device, network.dtype)
        fit = {layer.name for layer in layers_by_formula(network, first, precision, each_sample=False)}
        odd += torch.tensor([float(layer.name not in fit) for layer in found], dtype=torch.float64, device=space.device)
    space.all_reduce(odd)
    layers = [layer for layer, count in zip(found, odd.tolist(), strict=True) if count == 0]
    held = {name for layer in layers for name in layer.parameters}
    left = [name for name in network.names if name not in held]
    if adapted := [name for name in left if name not in rest and ".lora_" in name]:
        layer = adapted[0].partition(".lora_")[0]
        raise UsageError(
            f"Kronecker factors of the adapter on {layer}: its gradient is not that of the layer's inputs and outputs, as "
            "where a weight is changed before it is used; leave it out of model.lora.target_modules, or choose another method"
        )
    return layers, left


class _Sums:
    """Sums of factors over this rank's samples."""

    def __init__(self, layers: list[Layer], network: Network, rest: list[str]) -> None:
        self.layers, self.network, self.rest = layers, network, rest
        options: dict[str, Any] = {"dtype": network.dtype, "device": network.device}
        shapes = {layer.name: weight_of(layer.base).flatten(1).shape for layer in layers}
        self.inputs = {name: torch.zeros(i, i, **options) for name, (_, i) in shapes.items()}
        self.outputs = {name: torch.zeros(o, o, **options) for name, (o, _) in shapes.items()}
        theta = dict(zip(network.names, network.theta, strict=True))
        self.diagonal = {name: torch.zeros_like(theta[name]) for name in rest}

    def add(self, passed: Pass, cotangents: list[Tensor]) -> None:
        for layer in self.layers:
            x = input_rows(layer.base, passed.inputs[layer.name], len(passed.outputs)).to(self.network.dtype)
            rows = x.flatten(0, 1) / x.shape[1] ** 0.5  # the mean over tokens, the sum over samples
            self.inputs[layer.name].addmm_(rows.T, rows)
        for number, u in enumerate(cotangents):
            last = number == len(cotangents) - 1
            found = output_gradients(passed, u, (layer.name for layer in self.layers), retain=not last)
            for layer in self.layers:
                if layer.name in found:
                    g = output_rows(layer.base, found[layer.name], len(u)).flatten(0, 1).to(self.network.dtype)
                    self.outputs[layer.name].addmm_(g.T, g)

    def add_rest(self, batch: Any, cotangents: list[Tensor], exact: bool) -> None:
        """Squared gradients of single samples in the parameters that no layer holds; half of the draws is enough."""
        if not self.rest:
            return
        chosen = torch.stack(cotangents if exact else cotangents[: (len(cotangents) + 1) // 2], dim=1)  # (B, draws, C)
        tensors = tensors_of(batch)
        theta = dict(zip(self.network.names, self.network.theta, strict=True))
        start = tuple(theta[name].detach() for name in self.rest)

        def squares(one: list[Tensor], us: Tensor) -> tuple[Tensor, ...]:
            """Of one sample, summed over its cotangents ``us`` (draws, C)."""
            row = iter(one)
            sample = map_tensors(batch, lambda _: next(row)[None])

            def outputs(values: tuple[Tensor, ...]) -> Tensor:
                whole = {**theta, **dict(zip(self.rest, values, strict=True))}
                return self.network(tuple(whole[name] for name in self.network.names), sample)[0][0]

            pull = torch.func.vjp(outputs, start)[1]
            return tuple(g.square().sum(dim=0) for g in torch.func.vmap(pull)(us)[0])

        times = len(cotangents) / chosen.shape[1]
        numbers = chosen.shape[1] * sum(t.numel() for t in start)  # of one sample's gradients
        together = max(1, GRADIENT_BYTES // (numbers * self.network.dtype.itemsize))
        for place in range(0, len(chosen), together):
            part, us = [t[place : place + together] for t in tensors], chosen[place : place + together]
            try:
                found = [s.sum(dim=0) for s in torch.func.vmap(squares)(part, us)]
            except RuntimeError:  # a network that looks at its values, which vmap does not take: sample by sample
                rows = [squares([t[n] for t in part], us[n]) for n in range(len(us))]
                found = [torch.stack(parts).sum(dim=0) for parts in zip(*rows, strict=True)]
            for name, square in zip(self.rest, found, strict=True):
                self.diagonal[name].add_(square, alpha=times)

    def finish(self, total: int, given: Mapping[str, str], space: VectorSpace) -> KroneckerFactors:
        tensors = [*self.inputs.values(), *self.outputs.values(), *self.diagonal.values()]
        flat = torch.cat([t.flatten() for t in tensors])
        flat = space.sum_over_ranks(flat).div_(total)
        if not bool(torch.isfinite(flat).all()):
            raise RunFailedError(
                "Kronecker factors are not finite: activations or gradients overflow at these parameters; try "
                "curvature.precision=float64 or a smaller train.lr"
            )
        parts = iter(
            [p.view(t.shape).clone() for p, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]
        )
        inputs = {name: next(parts) for name in self.inputs}
        outputs = {name: next(parts) for name in self.outputs}
        diagonal = {given[name]: next(parts) for name in self.diagonal}
        values = {
            given[name]: value.detach() for name, value in zip(self.network.names, self.network.theta, strict=True)
        }
        layers = []
        for layer in self.layers:
            names = layer.parameters
            if layer.scaling is not None and len(names) == 1:  # A is frozen: a constant of the network
                frozen = names[0].replace(".lora_B.", ".lora_A.")
                values[frozen] = self.network.constant(frozen)
                given = {**given, frozen: frozen}
                names = (frozen, names[0])
            named = tuple(given[name] for name in names)
            layers.append(
                LayerFactors(
                    layer.name, _symmetric(inputs[layer.name]), _symmetric(outputs[layer.name]), named, layer.scaling
                )
            )
        kept = {
            name: values[name].clone() for layer in layers if layer.scaling is not None for name in layer.parameters
        }
        return KroneckerFactors(tuple(layers), diagonal, kept, space, total)


def adapter_form(inputs: Tensor, outputs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """sum_t tr(G_t D A_t D^T) (0-dim, float64) of D = L R with L (o, r) and R (r, i): no matrix of D's size is made.

    ``inputs`` A ([t,] i, i) and ``outputs`` G ([t,] o, o).
    """
    inner = left.T @ outputs @ left  # ([t,] r, r)
    outer = right @ inputs @ right.T
    return (inner * outer.transpose(-1, -2)).sum().double()


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _given_names(parameters: Parameters, scope: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """The names under which the parameters were given, by their names in the model."""
    if not isinstance(parameters, Mapping):
        return {name: name for name in scope}
    by_id = {id(p): name for name, p in parameters.items()}
    return {name: by_id[id(p)] for name, p in scope.items()}
