"""Gradients of an FSDP2 model at displaced parameters, by the sharded model itself: nothing is gathered whole.

Here, and only here, the user's model is changed: its shards are moved and its mode set for the duration, and put
back bit for bit whatever happens. All ranks must run the same number of forward passes, for each is a collective:
shorter shares are filled up with batches of weight zero, borrowed where a rank has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from nostalgia.curvature.batches import to_device
from nostalgia.curvature.context import fix_randomness, product_context
from nostalgia.errors import UsageError
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.parallel.modules import inner_module, reshard, unpatched
from nostalgia.parallel.tensors import local


class ShardedGradient:
    """Summed loss and gradient of all ranks' batches, by ordinary forwards and backwards of the sharded model."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[nn.Module, Any], tuple[Tensor, int]],
        batches: Iterable[Any],
        parameters: Mapping[str, nn.Parameter],
        space: VectorSpace,
        precision: str,
    ) -> None:
        frozen = [name for name, p in parameters.items() if not p.requires_grad]
        if frozen:
            raise UsageError(
                f"finite differences under FSDP2: {frozen[0]} is in scope but does not require a gradient; "
                "set requires_grad before fully_shard, or use curvature.hvp=exact"
            )
        if precision == "float64" and any(p.dtype != torch.float64 for p in parameters.values()):
            raise UsageError(
                "precision=float64: finite differences under FSDP2 compute in the sharded model's own precision; "
                "use curvature.hvp=exact"
            )
        self.model, self.loss_fn, self.batches = inner_module(model), loss_fn, batches
        self.parameters, self.space, self.precision = list(parameters.values()), space, precision
        # As exact products do, where the model computes in a dtype they know; else inputs are as in training.
        dtype = self.parameters[0].dtype
        self._dtype = dtype if dtype in (torch.float32, torch.float64) else None
        self._filling: tuple[int, Any] | None = None  # forward passes a rank runs, and what to fill up with

    def measure(self) -> tuple[float, int]:
        """Summed loss and samples of this rank's share."""
        with self._displaced(None), torch.no_grad():
            return self._run(backward=False)

    def summed_at(self, displacement: Tensor | None) -> Tensor:
        """Gradient (P_local,) of the loss summed over all ranks, at parameters moved by ``displacement`` (P_local,)."""
        with self._displaced(displacement), torch.enable_grad():
            self._run(backward=True)
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            # FSDP2 averages gradients over ranks.
            return self.space.take(gradients) * self.space.world_size

    def _run(self, *, backward: bool) -> tuple[float, int]:
        passes, example = self._fill()
        total, samples, done = 0.0, 0, 0
        with product_context(self.precision, self.space.device):
            for index, batch in enumerate(self.batches):
                fix_randomness(index, self.space.device)
                loss, number = self.loss_fn(self.model, self._batch(batch))
                if backward:
                    loss.backward()
                total, samples, done = total + float(loss.detach()), samples + int(number), index + 1
            for _ in range(passes - done):
                loss, _ = self.loss_fn(self.model, self._batch(example))
                if backward:
                    (loss * 0.0).backward()
        return total, samples

    def _batch(self, batch: Any) -> Any:
        return to_device(batch, self.space.device, self._dtype)

    def _fill(self) -> tuple[int, Any]:
        if self._filling is None:
            count, example = 0, None
            for batch in self.batches:
                count, example = count + 1, batch
            self._filling = _agree_on_passes(count, example, self.space)
        return self._filling

    @contextmanager
    def _displaced(self, displacement: Tensor | None) -> Iterator[None]:
        """Shards moved, evaluation mode, gradients set aside; everything put back bit for bit."""
        model = self.model
        reshard(model)  # parameters left whole by an evaluation would not follow their shards
        own = list(model.parameters())
        shards = [local(p) for p in self.parameters]
        values = [shard.clone() for shard in shards]
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        modes = [(module, module.training) for module in model.modules()]
        gradients = [p.grad for p in own]
        try:
            for p in own:
                p.grad = None
            model.eval()
            if displacement is not None:
                self.space.put(self.space.take(self.parameters) + displacement, self.parameters)
            with unpatched(model):
                yield
        except BaseException:
            _abort_iteration(model)
            raise
        finally:
            reshard(model)  # a backward does it too, unless FSDP2 was told not to
            with torch.no_grad():
                torch._foreach_copy_(shards, values)
                for buffer, value in buffers:
                    buffer.copy_(value)
            for module, mode in modes:
                module.training = mode
            for p, gradient in zip(own, gradients, strict=True):
                p.grad = gradient


def _agree_on_passes(count: int, example: Any, space: VectorSpace) -> tuple[int, Any]:
    """The largest number of batches on a rank, and a batch to fill up with: another rank's where this has none."""
    if space.world_size == 1:
        return count, example
    counts = [0] * space.world_size
    dist.all_gather_object(counts, count, group=space.group)
    if max(counts) > 0 and min(counts) == 0:
        source = counts.index(max(counts))
        # By way of the CPU: a CUDA tensor would arrive on the sender's device.
        shared = [to_device(example, torch.device("cpu")) if space.rank == source else None]
        dist.broadcast_object_list(shared, group_src=source, group=space.group)
        example = shared[0] if count == 0 else example
    return max(counts), example


def _abort_iteration(model: nn.Module) -> None:
    """Let FSDP2 forget a forward or backward that an exception cut off, parameters left whole among it."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    below = {id(child) for module in sharded for child in module.modules() if child is not module}
    for module in sharded:
        if not hasattr(module, "reset_iter_state"):  # in torch before it could be told so
            module.set_reshard_after_forward(True, recurse=False)
        elif id(module) not in below:
            module.reset_iter_state()
