"""Projected training steps on every placement of parameters and basis, against dense formulas on one process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

from nostalgia.linalg.block import Block
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.projection import CurvatureMemory, GradientProjector
from nostalgia.training.step import clip_gradients

STEPS, COLUMNS, SAMPLES, MAX_NORM = 4, 4, 11, 0.5
METRIC_EVERY = 3  # the first and the last step look at the metric
SHARES = {1: [0, 11], 2: [0, 4, 11], 3: [0, 7, 7, 11]}  # unequal, and an empty one


def network() -> nn.Module:
    """The last layer is a head and not projected; the one-row layers leave all ranks but the first without a shard."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 7), nn.Tanh(), nn.Linear(7, 3)
    ).double()  # fmt: skip


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (SAMPLES,), generator=generator)


def wrapped(model: nn.Module, wrap: str) -> nn.Module:
    if wrap == "ddp":
        return DistributedDataParallel(model)
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def in_scope(model: nn.Module) -> dict[str, nn.Parameter]:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: p for name, p in inner.named_parameters() if not name.startswith("6.")}


def make_optimizer(kind: str, model: nn.Module) -> Optimizer:
    """Two groups that differ, so that the metric is not one formula for all coordinates."""
    own = list(model.parameters())
    if kind == "sgd":
        return SGD([{"params": own[:2]}, {"params": own[2:], "lr": 0.02}], lr=0.05, momentum=0.9, weight_decay=0.05)
    groups = [{"params": own[:3]}, {"params": own[3:], "betas": (0.8, 0.99), "eps": 1e-6}]
    return AdamW(groups, lr=1e-2, weight_decay=0.05)


def whole(tensors: Iterable[Tensor]) -> Tensor:
    """One flat vector (P,) of parameters or gradients, shards gathered; a copy."""
    return torch.cat([(t.full_tensor() if isinstance(t, DTensor) else t).detach().flatten() for t in tensors])


class Dense:
    """The method on one process with all samples: every formula written out over flat vectors and a whole Q (k, P)."""

    def __init__(self, kind: str, project: str, q: Tensor) -> None:
        self.model, self.project, self.q = network(), project, q
        self.optimizer = make_optimizer(kind, self.model)
        self.parameters = list(in_scope(self.model).values())
        self.anchor = whole(self.parameters)
        gram = q @ q.T  # of the stored rows: not the identity where they are rounded
        self.taken, self.inverse = 0, torch.empty(0)
        self.inside = q.T @ torch.linalg.inv(gram) @ q  # (P, P)

    def step(self) -> dict[str, Tensor]:
        inputs, labels = data()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(inputs), labels).backward()
        g = whole(p.grad for p in self.parameters)
        removed = self.inside @ g
        fraction = removed @ removed / (g @ g)
        self.write(g - removed, [p.grad for p in self.parameters])
        projected = g - removed
        everything = torch.cat([p.grad.flatten() for p in self.model.parameters()])
        norm = everything.norm()
        for p in self.model.parameters():
            p.grad.mul_((MAX_NORM / (norm + 1e-6)).clamp(max=1.0))
        before = whole(self.parameters)
        self.optimizer.step()
        if self.project == "constrained":
            d0 = whole(self.parameters) - before
            if self.taken % METRIC_EVERY == 0:
                self.inverse = 1 / self.metric()
            inverse = self.inverse
            system = self.q @ torch.diag(inverse) @ self.q.T
            d = d0 - inverse * (self.q.T @ torch.linalg.solve(system, self.q @ d0))
            self.write(before + d, self.parameters)
        if self.project == "displacement":
            moved = whole(self.parameters) - self.anchor
            self.write(self.anchor + moved - self.inside @ moved, self.parameters)
        self.taken += 1
        moved = whole(self.parameters) - self.anchor
        leak = (self.inside @ moved).norm() / moved.norm()
        values = whole(self.model.parameters())
        return {"gradient": projected, "fraction": fraction, "norm": norm, "leak": leak, "parameters": values}

    def metric(self) -> Tensor:
        """D (P,) of AdamW, floored at a tenth of its root mean square; ones for SGD."""
        if isinstance(self.optimizer, SGD):
            return torch.ones_like(self.anchor)
        parts = []
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                state = self.optimizer.state[p]
                v_hat = state["exp_avg_sq"] / (1 - group["betas"][1] ** int(state["step"]))
                parts.append((v_hat.sqrt() + group["eps"]).flatten())
        metric = torch.cat(parts)[: len(self.anchor)]
        return metric.clamp_min(0.1 * metric.square().mean().sqrt())

    @staticmethod
    def write(flat: Tensor, tensors: list) -> None:
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.data.copy_(part.view_as(tensor))


class Distributed:
    """The same step by the project's own pieces, with this rank's share of the samples."""

    def __init__(self, kind: str, project: str, wrap: str, memory: CurvatureMemory) -> None:
        self.model = wrapped(network(), wrap)
        self.optimizer = make_optimizer(kind, self.model)
        self.parameters = in_scope(self.model)
        self.memory, self.project = memory, project
        self.projector = GradientProjector(memory, self.parameters, METRIC_EVERY)

    def step(self) -> dict[str, Tensor]:
        low, high = SHARES[dist.get_world_size()][dist.get_rank() : dist.get_rank() + 2]
        inputs, labels = (t[low:high] if low < high else t[:1] for t in data())
        weight = dist.get_world_size() / SAMPLES if low < high else 0.0
        self.renew_projector()
        self.optimizer.zero_grad()
        (F.cross_entropy(self.model(inputs), labels, reduction="sum") * weight).backward()
        fraction = self.projector.project_gradients()
        gradient = whole(p.grad for p in self.parameters.values())
        norm = clip_gradients(self.model.parameters(), MAX_NORM)
        steps = {"constrained": self.projector.constrain_step, "displacement": self.projector.displace_step}
        steps.get(self.project, lambda optimizer: optimizer.step())(self.optimizer)
        return {
            "gradient": gradient,
            "fraction": fraction,
            "norm": torch.tensor(norm, dtype=torch.float64),
            "leak": torch.tensor(self.projector.leak(), dtype=torch.float64),
            "parameters": whole(self.model.parameters()),
        }

    def renew_projector(self) -> None:
        """Go on with another projector that takes up the state of this one, through the run's space as a checkpoint does."""
        state, space = self.projector.state(), VectorSpace.of(self.parameters)

        def restored(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: restored(item) for key, item in value.items()}
            if isinstance(value, Block):
                whole_rows = value.space.gather_flat(value.rows)
                return Block(space.slice_flat(whole_rows), space)
            return value

        self.projector = GradientProjector(self.memory, self.parameters, METRIC_EVERY)
        self.projector.load_state(restored(state))


def check_all() -> dict[str, dict[str, float]]:
    """Largest absolute difference from the dense answer over all steps, by what was run and what was compared."""
    generator = torch.Generator().manual_seed(2)
    size = sum(p.numel() for p in in_scope(network()).values())
    basis = torch.linalg.qr(torch.randn(size, COLUMNS, generator=generator, dtype=torch.float64))[0].T.contiguous()
    errors = {}
    for kind in ("adamw", "sgd"):
        for project in ("gradient", "displacement", "constrained"):
            for dtype in (None, torch.bfloat16):
                expected = None
                for wrap, placement in (("ddp", "replicated"), ("ddp", "sharded"), ("fsdp2", "auto")):
                    memory = filled_memory(basis, placement, dtype, in_scope(wrapped(network(), wrap)))
                    if expected is None:
                        stored = basis if dtype is None else basis.to(dtype).double()
                        dense = Dense(kind, project, stored)
                        expected = [dense.step() for _ in range(STEPS)]
                    name = f"{kind} {project} {wrap} {placement} {dtype}"
                    errors[name] = compare(expected, Distributed(kind, project, wrap, memory))
    return errors


def filled_memory(
    basis: Tensor, placement: str, dtype: torch.dtype | None, parameters: dict[str, nn.Parameter]
) -> CurvatureMemory:
    space = VectorSpace.of(parameters)
    memory = CurvatureMemory(COLUMNS, placement=placement, dtype=dtype)
    memory.load(space.slice_flat(basis), torch.arange(COLUMNS, 0, -1), tasks=1, space=space)
    here = {"replicated": space.size, "sharded": space.local_size, "auto": space.local_size}[placement]
    assert memory.basis is not None
    assert memory.basis.shape == (COLUMNS, here)
    return memory


def compare(expected: list[dict[str, Tensor]], run: Distributed) -> dict[str, float]:
    worst: dict[str, float] = {}
    for step in expected:
        for name, value in run.step().items():
            worst[name] = max(worst.get(name, 0.0), float((value - step[name]).abs().max()))
    return worst


def shard_sizes() -> list[int]:
    """How many numbers of each projected parameter this rank holds under FSDP2."""
    return [p.to_local().numel() for p in in_scope(wrapped(network(), "fsdp2")).values()]  # type: ignore[attr-defined]


def check() -> dict[str, Any]:
    return {"errors": check_all(), "shards": shard_sizes()}
