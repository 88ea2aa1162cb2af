"""What a step does with numbers that are not finite: it names them, or with float16 is left out."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn

from nostalgia.data.stream import Batch, Step
from nostalgia.errors import RunFailedError
from nostalgia.methods.finetune import Finetune
from nostalgia.models.objective import Objective
from nostalgia.models.task_model import TaskModel
from nostalgia.training.overhead import OverheadClock
from nostalgia.training.step import LEAST_SCALE, StepResult, train_step


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def half_precision(accelerator: Accelerator) -> Accelerator:
    """Float16's gradient scaler as it works on a GPU; the arithmetic itself stays float32."""
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu")
    return accelerator


def network() -> TaskModel:
    torch.manual_seed(0)
    return TaskModel(nn.Flatten(), [nn.Linear(12, 3)])


def a_step(bad: float | None) -> Step:
    """Two micro-batches of four samples; the sample with id 12 holds ``bad``."""
    batches = []
    for start in (3, 10):
        images = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(start))
        ids = torch.arange(start, start + 4)
        if bad is not None:
            images[ids == 12, 0, 0, 0] = bad
        zeros = torch.zeros(4, dtype=torch.int64)
        batches.append(Batch(images, zeros, torch.ones(4), ids, zeros))
    return Step(batches, 8, epoch=2, step=7)


def take(model: TaskModel, accelerator: Accelerator, step: Step) -> StepResult:
    optimizer = AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), scaler=accelerator.scaler)
    method = Finetune(Finetune.Config())
    method.task = SimpleNamespace(objective=Objective())  # type: ignore[assignment]
    clock = OverheadClock(model, optimizer.optimizer, torch.device("cpu"))
    return train_step(model, optimizer, method, step, accelerator=accelerator, max_grad_norm=1.0, clock=clock)


def weight(model: TaskModel) -> Tensor:
    (head,) = model.heads
    assert isinstance(head, nn.Linear)
    return head.weight.detach().clone()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_line_names_epoch_step_and_samples_and_nothing_moves(accelerator: Accelerator, bad: float) -> None:
    model = network()
    before = weight(model)
    with pytest.raises(RunFailedError) as caught:
        take(model, accelerator, a_step(bad))
    assert str(caught.value).startswith("epoch 2, step 7: loss is not finite (samples 10, 11, 12, 13); ")
    assert torch.equal(weight(model), before)


def test_a_gradient_that_overflows_alone_is_named_as_such(accelerator: Accelerator) -> None:
    model = network()
    model.heads[0].weight.register_hook(lambda grad: grad * float("inf"))  # type: ignore[union-attr]
    with pytest.raises(RunFailedError, match=r"epoch 2, step 7: gradient norm is (nan|inf)"):
        take(model, accelerator, a_step(None))


def test_float16_skips_the_step_and_halves_its_scale(accelerator: Accelerator) -> None:
    accelerator, model = half_precision(accelerator), network()
    before, scale = weight(model), accelerator.scaler.get_scale()
    result = take(model, accelerator, a_step(float("inf")))
    assert result.skipped
    assert torch.equal(weight(model), before)
    assert accelerator.scaler.get_scale() == scale / 2
    assert not take(model, accelerator, a_step(None)).skipped
    assert not torch.equal(weight(model), before)


def test_float16_that_skips_every_step_stops(accelerator: Accelerator) -> None:
    accelerator, model = half_precision(accelerator), network()
    last = accelerator.scaler.get_scale() * 0.5**16
    while accelerator.scaler.get_scale() > last:
        assert take(model, accelerator, a_step(float("nan"))).skipped
    assert last == LEAST_SCALE
    with pytest.raises(RunFailedError, match=r"epoch 2, step 7: loss is not finite \(samples 10, 11, 12, 13\)"):
        take(model, accelerator, a_step(float("nan")))
