"""One optimizer step: forward and backward over its micro-batches, synchronise, unscale, the method, clip, step."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nostalgia.data.stream import Batch, Step
from nostalgia.errors import RunFailedError, UsageError
from nostalgia.methods.base import Method
from nostalgia.models.objective import Output
from nostalgia.parallel.tensors import local
from nostalgia.training.overhead import OverheadClock

LEAST_SCALE = 1.0  # of the float16 loss: 17 steps skipped in a row, from Accelerate's first scale


@dataclass(frozen=True)
class StepResult:
    """What a step measured; sums are this rank's and live on the device, the norm is the same on all ranks."""

    loss_sum: Tensor  # over this rank's valid samples, with what the method added
    correct: Tensor
    num_samples: int  # over all ranks
    grad_norm: float  # after the method's change, before clipping
    skipped: bool  # a float16 overflow: the gradient scaler left this step out


def train_step(
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    method: Method,
    step: Step,
    *,
    accelerator: Accelerator,
    max_grad_norm: float | None,
    clock: OverheadClock,
) -> StepResult:
    """Take one step on the mean loss of all samples of ``step``, over all ranks and micro-batches.

    Raises RunFailedError, on every rank alike, when the gradient is not finite. With float16 the scaler skips the step
    instead and halves its scale; the error comes once that is below `LEAST_SCALE`, when nothing is learned any more.
    """
    optimizer.zero_grad(set_to_none=True)
    total_loss, correct = [], []
    # DDP and FSDP2 average over ranks; the loss of a step is the sum over all its samples by their number.
    scale = accelerator.num_processes / step.num_samples

    def forward(batch: Batch) -> Output:
        output = method.loss(model, batch)
        if not isinstance(output, Output) or output.loss.ndim:
            raise UsageError(
                f"method={method.name}: loss returned {output!r:.60}; allowed is an Output whose loss is a number, as "
                "self.task.objective gives it"
            )
        return output

    def backward(output: Output) -> None:
        accelerator.backward(output.loss * scale)

    last = len(step.micro_batches) - 1
    for i, batch in enumerate(step.micro_batches):
        with accelerator.no_sync(model) if i < last else nullcontext():
            output = clock.passes(len(batch), lambda batch=batch: forward(batch), backward)  # type: ignore[misc]
        total_loss.append(output.loss.detach())
        correct.append(output.correct)
    accelerator.unscale_gradients(optimizer)
    clock.hook(method.gradients)
    grad_norm = clip_gradients(model.parameters(), max_grad_norm)
    if accelerator.scaler is None and not torch.isfinite(torch.tensor(grad_norm)):
        raise RunFailedError(_non_finite(accelerator, step, total_loss, grad_norm))
    clock.hook(lambda: method.step(optimizer))
    if optimizer.step_was_skipped and accelerator.scaler is not None and accelerator.scaler.get_scale() < LEAST_SCALE:
        raise RunFailedError(_non_finite(accelerator, step, total_loss, grad_norm))
    return StepResult(
        loss_sum=torch.stack(total_loss).sum(),
        correct=torch.stack(correct).sum(),
        num_samples=step.num_samples,
        grad_norm=grad_norm,
        skipped=optimizer.step_was_skipped,
    )


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> float:
    """Scale the gradients to a global norm of at most ``max_norm`` (None: leave them); returns the norm before.

    Accelerate's own clipping would unscale float16 gradients a second time.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    norm = torch.nn.utils.get_total_norm([g for g in gradients if not isinstance(g, DTensor)])
    if sharded:  # what of them lies here, all at once: as DTensors each would be dispatched by itself
        squared = torch.nn.utils.get_total_norm([local(g) for g in sharded]).square()
        torch.distributed.all_reduce(squared, group=sharded[0].device_mesh.get_group())
        norm = (squared + norm.to(squared).square()).sqrt()
    if max_norm is not None and gradients:
        torch._foreach_mul_([local(g) for g in gradients], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return float(norm)


def _non_finite(accelerator: Accelerator, step: Step, losses: list[Tensor], grad_norm: float) -> str:
    """The error's line; names the samples of the micro-batches whose loss is not finite, on whatever rank they are."""
    bad = torch.zeros(0, dtype=torch.int64, device=accelerator.device)
    for batch, loss in zip(step.micro_batches, losses, strict=True):
        if not torch.isfinite(loss):
            bad = torch.cat([bad, batch.indices[batch.valid]])
    width = accelerator.gather(torch.tensor([len(bad)], device=accelerator.device)).max().item()
    padded = torch.full((int(width),), -1, dtype=torch.int64, device=accelerator.device)
    padded[: len(bad)] = bad
    ids = [i for i in accelerator.gather(padded).tolist() if i >= 0] if width else []
    what = f"loss is not finite (samples {', '.join(map(str, ids[:32]))})" if ids else f"gradient norm is {grad_norm}"
    return (
        f"epoch {step.epoch}, step {step.step}: {what}; lower train.lr, use train.precision=32 or bf16, "
        "or look at these samples"
    )
