"""Products, eigenpairs and projection on one device, however many ranks share it: DDP's slices and FSDP2's shards."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nostalgia.curvature import GGNOperator, HessianOperator
from nostalgia.curvature.base import BatchedOperator
from nostalgia.linalg.lanczos import lanczos
from nostalgia.parallel.tensors import from_main
from nostalgia.projection import CurvatureMemory, GradientProjector
from tests.distributed.cases_operators import SAMPLES, compare, in_scope, share
from tests.unit.curvature.networks import NETWORKS, Oracle, batches, forward_fn, loss_fn, relative


def check_all(device: str, wraps: Sequence[str] = ("ddp", "fsdp2")) -> dict[str, float]:
    """Errors relative to the dense matrices of one process on the CPU, in float64; the largest leak last."""
    errors = {}
    for kind in ("mlp", "resnet", "vit_lora"):
        original = NETWORKS[kind]()
        (data,) = batches(kind, (SAMPLES,))
        oracle = Oracle(copy.deepcopy(original), list(in_scope(kind, original)), [data])
        for wrap in wraps:
            model = copy.deepcopy(original).to(device)
            if wrap == "fsdp2":
                shard(model, device)
            mine = [(inputs.to(device), labels.to(device)) for inputs, labels in share(kind, data)]
            scope = in_scope(kind, model)
            for method in ("exact", "jvp"):
                hessian = HessianOperator(model, loss_fn, mine, scope, method=method)
                ggn = GGNOperator(model, forward_fn, mine, scope, method=method)
                errors[f"{kind} {wrap} {method} hessian"] = check_product(hessian, oracle, oracle.hessian())
                errors[f"{kind} {wrap} {method} ggn"] = check_product(ggn, oracle, oracle.gauss_newton())
            if kind == "mlp":
                errors.update(check_eigenpairs_and_projection(model, hessian, oracle, wrap))
    return errors


def restore_on_cuda_alone() -> list[float]:
    """What rank 0's values become on both ranks, of a target on the CPU and one on the card, in a group that takes no tensor on
    the CPU, as NCCL's."""
    torch.cuda.set_device(0)
    dist.init_process_group("cuda:gloo")
    targets = {"step": torch.tensor(0.0), "weight": torch.zeros(2, device="cuda")}
    from_main(targets, {"step": torch.tensor(3.0), "weight": torch.tensor([1.0, 2.0])}, "here")
    assert targets["step"].device.type == "cpu"
    return [float(targets["step"]), *targets["weight"].tolist()]


def shard(model: nn.Module, device: str) -> None:
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for module in list(model.modules()):
        if type(module).__name__ in ("ViTLayer", "BasicBlock"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


class _Moved:
    """The oracle's answers on the operator's device."""

    def __init__(self, oracle: Oracle, device: torch.device) -> None:
        self.loss = oracle.loss
        self._gradient = oracle.gradient().to(device)

    def gradient(self) -> torch.Tensor:
        return self._gradient


def check_product(operator: BatchedOperator, oracle: Oracle, matrix: torch.Tensor) -> float:
    assert operator.space.zeros().device.type == operator.device.type
    return compare(operator, matrix.to(operator.device), _Moved(oracle, operator.device))


def check_eigenpairs_and_projection(
    model: nn.Module, operator: BatchedOperator, oracle: Oracle, wrap: str
) -> dict[str, float]:
    """Eigenvalues, the projected gradient, and the leak of constrained steps."""
    pairs = lanczos(operator, 4, tol=1e-10)
    assert bool(pairs.converged.all())
    expected = torch.linalg.eigvalsh(oracle.hessian()).flip(0)[:4]
    memory = CurvatureMemory(4)
    memory.update(pairs)
    projector = GradientProjector(memory, operator.parameters)
    set_gradients(operator, oracle.gradient())
    projector.project_gradients()
    basis = operator.space.gather_flat(pairs.eigenvectors).cpu()
    positive = basis[pairs.eigenvalues > 0]
    wanted = oracle.gradient() - positive.T @ (positive @ oracle.gradient())
    found = torch.cat([full(p.grad).reshape(-1) for p in operator.parameters.values()]).cpu()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
    for _ in range(3):
        set_gradients(operator, oracle.gradient())
        projector.project_gradients()
        projector.constrain_step(optimizer)
    leak = projector.leak()
    assert leak is not None
    return {
        f"{wrap} eigenvalues": relative(pairs.eigenvalues, expected),
        f"{wrap} projected gradient": relative(found, wanted),
        f"{wrap} leak": leak,
    }


def set_gradients(operator: BatchedOperator, gradient: torch.Tensor) -> None:
    """The flat ``gradient`` (P,) as every rank's synchronised one."""
    space = operator.space
    parameters = list(operator.parameters.values())
    for p in parameters:
        p.grad = torch.zeros_like(p)
    space.put(space.slice_flat(gradient.to(operator.device)[None])[0], [p.grad for p in parameters])


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
