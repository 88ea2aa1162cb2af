"""A quadratic penalty on weight changes by the Kronecker factors of finished tasks.

    R(theta) = strength/2 sum_t sum_l tr(G_tl D_l A_tl D_l^T)  +  strength/2 sum_t sum_i h_ti (theta_i - theta*_i)^2

D_l is the change of layer l's weight since the reference point, the end of the latest task: W - W*, or s (B A - B* A*) of an
adapter. In weight space the penalty sees dB dA, to which a quadratic form in (A, B) is blind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nostalgia.curvature.kronecker import KroneckerFactors, adapter_form
from nostalgia.errors import UsageError
from nostalgia.models.adapters import add_gradient
from nostalgia.parallel.tensors import local, placed_as
from nostalgia.projection.adapter_group import AdapterGroup, LayerTerms, adapter_groups, whole


@dataclass(frozen=True)
class KroneckerUpdate:
    """What a finished task did to the memory."""

    tasks: int
    merged: bool  # several tasks into one pair of factors a layer
    error: float  # relative error of that, in the Frobenius norm over all layers; 0.0 where exact
    num_bytes: int


class KroneckerMemory:
    """Factors of finished tasks, and the penalty they make.

    Tasks are kept apart, and the penalty is exact, while their factors fit in ``budget_bytes`` (None: always); beyond that
    each layer's terms become the one pair G (x) A closest to their sum (Van Loan and Pitsianis 1993). Every rank holds
    all of it.
    """

    def __init__(self, strength: float = 1.0, budget_bytes: int | None = None) -> None:
        if not strength >= 0:
            raise UsageError(f"strength={strength}: allowed is 0 or more")
        self.strength, self.budget_bytes, self.tasks = strength, budget_bytes, 0
        self.layers: dict[str, LayerTerms] = {}
        self.diagonal: dict[str, Tensor] = {}  # summed over tasks, in parameter shape
        self.groups: list[AdapterGroup] | None = None  # of the layers and the reference point; None: to be made
        self._local: list[tuple[Tensor, Tensor]] | None = None  # this rank's diagonals and references; None likewise
        self.reference: dict[str, Tensor] = {}  # parameters at the reference point; shards where they are trained so

    @property
    def num_bytes(self) -> int:
        """On each rank, the reference point included."""
        kept = [*self.diagonal.values(), *self.reference.values()]
        return sum(layer.num_bytes for layer in self.layers.values()) + sum(t.numel() * t.element_size() for t in kept)

    @torch.no_grad()
    def update(self, factors: KroneckerFactors, parameters: Mapping[str, nn.Parameter]) -> KroneckerUpdate:
        """Take in a finished task's factors; ``parameters`` are as the task ended, the new reference point.

        What is kept has the precision of the parameters, whatever the factors were measured in.
        """
        self.tasks += 1
        for layer in factors.layers:
            dtype = parameters[layer.parameters[0]].dtype
            inputs, outputs = layer.inputs[None].to(dtype), layer.outputs[None].to(dtype)
            new = LayerTerms(inputs, outputs, layer.parameters, layer.scaling)
            old = self.layers.get(layer.name)
            if old is not None:
                new.inputs, new.outputs = torch.cat([old.inputs, new.inputs]), torch.cat([old.outputs, new.outputs])
            self.layers[layer.name] = new
        for name, measured in factors.diagonal.items():
            diagonal = measured.to(parameters[name].dtype)
            self.diagonal[name] = diagonal if name not in self.diagonal else self.diagonal[name] + diagonal
        self.anchor(parameters)
        size, error, merged = sum(layer.num_bytes for layer in self.layers.values()), 0.0, False
        if (
            self.budget_bytes is not None
            and size > self.budget_bytes
            and any(len(t.inputs) > 1 for t in self.layers.values())
        ):
            merged, error = True, self._merge()
        return KroneckerUpdate(self.tasks, merged, error, self.num_bytes)

    @torch.no_grad()
    def anchor(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Let the reference point be ``parameters`` as they are now."""
        self.reference = {name: parameters[name].detach().clone() for name in self._names()}
        self.groups = self._local = None

    @torch.no_grad()
    def add_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add the penalty's gradient to those of ``parameters``, whole or FSDP2's shards; strength 0 leaves them untouched.

        An adapter's costs 4 d^2 r a term: no matrix of the weight's size is made.
        """
        if self.strength == 0:
            return
        if self.groups is None:
            self.groups = adapter_groups(list(self.layers.values()), self.reference)
        for group in self.groups:
            group.add_gradients(parameters, self.strength)
        for layer in self.layers.values():
            if layer.scaling is None:
                (name,) = layer.parameters
                change = self._change(name, parameters).flatten(1)
                through = torch.bmm(change.expand(len(layer.inputs), -1, -1), layer.inputs)
                force = layer.outputs.flatten(0, 1).T @ through.flatten(0, 1)  # sum_t G_t D A_t, G_t symmetric
                add_gradient(parameters[name], force.view(parameters[name].shape), self.strength)
        self._add_diagonal_gradients(parameters)

    def penalty(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """R at ``parameters`` (0-dim), differentiable in them where they are plain tensors."""
        whole_weights = [layer.parameters[0] for layer in self.layers.values() if layer.scaling is None]
        total = self.quadratic({name: self._change(name, parameters) for name in [*whole_weights, *self.diagonal]})
        for layer in self.layers.values():
            if layer.scaling is not None:
                _, (left, right) = self._adapter(layer, parameters)
                total = total + layer.scaling**2 * adapter_form(layer.inputs, layer.outputs, left, right)
        return 0.5 * self.strength * total

    def quadratic(self, changes: Mapping[str, Tensor]) -> Tensor:
        """Sum over tasks of tr(G D A D^T) and d.diag.d (0-dim, float64) of changes D (o, i) of weights and d of others.

        Changes are by parameter name; that of a weight with an adapter by the name of its layer.
        """
        layers = {
            name if layer.scaling is not None else layer.parameters[0]: layer for name, layer in self.layers.items()
        }
        total = torch.zeros((), dtype=torch.float64)
        for name, change in changes.items():
            if name in layers:
                flat = change.flatten(1)
                term = ((layers[name].outputs @ flat @ layers[name].inputs) * flat).sum()
            else:
                term = (self.diagonal[name] * change.square()).sum()
            total = total.to(term.device) + term.double()
        return total

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts of tensors and plain values."""
        layers = {
            name: {
                "inputs": layer.inputs,
                "outputs": layer.outputs,
                "parameters": list(layer.parameters),
                "scaling": layer.scaling,
            }
            for name, layer in self.layers.items()
        }
        return {"tasks": self.tasks, "layers": layers, "diagonal": self.diagonal, "reference": self.reference}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave; the reference point lies as the present one does, if there is one."""
        self.groups = self._local = None
        self.tasks = state["tasks"]
        self.layers = {
            name: LayerTerms(kept["inputs"], kept["outputs"], tuple(kept["parameters"]), kept["scaling"])
            for name, kept in state["layers"].items()
        }
        self.diagonal = dict(state["diagonal"])
        present, self.reference = self.reference, {}
        for name, value in state["reference"].items():
            self.reference[name] = placed_as(value, present.get(name, value))

    def _add_diagonal_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """All of them at once, each rank for its shards: by single tensors the calls cost more than the numbers."""
        if not self.diagonal:
            return
        places = [parameters[name] for name in self.diagonal]
        if self._local is None:
            self._local = [
                (local(placed_as(diagonal, place)), local(placed_as(self.reference[name], place)))
                for (name, diagonal), place in zip(self.diagonal.items(), places, strict=True)
            ]
        for place in places:
            if place.grad is None:
                place.grad = torch.zeros_like(place)
        forces = torch._foreach_sub([local(place) for place in places], [reference for _, reference in self._local])
        torch._foreach_mul_(forces, [diagonal for diagonal, _ in self._local])
        gradients = [local(place.grad) for place in places if place.grad is not None]
        torch._foreach_add_(gradients, forces, alpha=self.strength)

    def _names(self) -> list[str]:
        return [name for layer in self.layers.values() for name in layer.parameters] + list(self.diagonal)

    def _change(self, name: str, parameters: Mapping[str, Tensor]) -> Tensor:
        """Whole change of a parameter since the reference point; a gather where it is a shard."""
        now, then = parameters[name], self.reference[name]
        if isinstance(now, DTensor) and not isinstance(then, DTensor):
            return now.full_tensor() - then
        change = now - then
        return change.full_tensor() if isinstance(change, DTensor) else change

    def _adapter(
        self, layer: LayerTerms, parameters: Mapping[str, Tensor]
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """A (r, i) and B (o, r), and B A - B* A* = [B, -B*] [A; A*] as a product of (o, 2r) and (2r, i)."""
        (a, b), (a0, b0) = (
            tuple(whole(source[name]).flatten(1) for name in layer.parameters)
            for source in (parameters, self.reference)
        )
        return (a, b), (torch.cat([b, -b0], dim=1), torch.cat([a, a0]))

    def _merge(self) -> float:
        """Replace each layer's terms by one; returns the relative error over all layers."""
        lost = kept = 0.0
        for layer in self.layers.values():
            layer.inputs, layer.outputs, squared_error, squared = nearest_pair(layer.inputs, layer.outputs)
            lost, kept = lost + squared_error, kept + squared
        return (lost / kept) ** 0.5 if kept else 0.0


def nearest_pair(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor, float, float]:
    """The pair G (1, o, o), A (1, i, i) closest to sum_t G_t (x) A_t in the Frobenius norm.

    Of ``outputs`` (t, o, o) and ``inputs`` (t, i, i), positive semi-definite, both within their spans (t small): the leading
    singular pair of a t x t problem. Returns the squared error and the squared norm as well.
    """
    flat_a, flat_g = inputs.double().flatten(1), outputs.double().flatten(1)
    gram_a, gram_g = flat_a @ flat_a.T, flat_g @ flat_g.T  # (t, t)
    norm = float((gram_a * gram_g).sum())
    # sum_t g_t a_t^T has the singular values of R_g R_a^T, with R^T R the Gram matrices.
    root_a, root_g = _root(gram_a), _root(gram_g)
    left, singular, right = torch.linalg.svd(root_g @ root_a)
    if norm <= 0 or float(singular[0]) == 0:
        return inputs[:1] * 0, outputs[:1] * 0, 0.0, 0.0
    # g = sum_t (root_a right_1)_t g_t / |.|: non-negative combinations keep both positive semi-definite.
    coefficients_g, coefficients_a = root_a @ right[0], root_g @ left[:, 0]
    g = torch.einsum("t,toi->oi", coefficients_g, outputs.double())
    a = torch.einsum("t,toi->oi", coefficients_a, inputs.double())
    scale = float(singular[0]) / float(g.norm() * a.norm())
    sign = 1.0 if float(g.trace()) >= 0 else -1.0
    g, a = sign * g * scale**0.5, sign * a * scale**0.5
    error = max(norm - float(singular[0]) ** 2, 0.0)
    return a[None].to(inputs.dtype), g[None].to(outputs.dtype), error, norm


def _root(matrix: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0.0).sqrt()) @ vectors.T
