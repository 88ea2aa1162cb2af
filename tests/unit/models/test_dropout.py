"""Dropout by sample: what it drops, and that it does not matter who else is in the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nostalgia.data.stream import Batch
from nostalgia.models.dropout import DropoutKeys, SampleDropout, by_sample

SAMPLES, ELEMENTS = 64, (50, 20)


def keys_of(draw: int = 0, count: int = SAMPLES) -> Tensor:
    nothing = torch.zeros(count)
    samples = torch.arange(count)
    batch = Batch(nothing, nothing, nothing, samples, torch.zeros(count, dtype=torch.int64), draw=draw)
    keys = batch.keys()
    assert keys is not None
    return keys


def dropped(keys: Tensor, p: float = 0.2, layer: int = 0, device: str = "cpu") -> Tensor:
    """(B, elements) bool."""
    module = SampleDropout(p, layer, DropoutKeys(keys))
    return (module(torch.ones(len(keys), *ELEMENTS, device=device)) == 0).flatten(1)


def correlation(one: Tensor, two: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten(), two.flatten()]).double())[0, 1])


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.9])
def test_the_share_that_is_dropped_is_p(p: float) -> None:
    """Over all, over each sample and over each element, within five standard deviations of independent draws."""
    found = dropped(keys_of(count=512), p).double()
    assert abs(float(found.mean()) - p) < 5 * (p * (1 - p) / found.numel()) ** 0.5
    for dim in (0, 1):
        deviations = (found.mean(dim) - p) / (p * (1 - p) / found.shape[dim]) ** 0.5
        assert float(deviations.abs().max()) < 6
        assert float(deviations.std()) == pytest.approx(1.0, abs=0.1)


def test_samples_layers_and_steps_are_independent() -> None:
    first = dropped(keys_of(1))
    limit = 5 / first.numel() ** 0.5
    others = [dropped(keys_of(2)), dropped(keys_of(1), layer=1), first.roll(1, 0), first.roll(1, 1)]
    assert max(abs(correlation(first, other)) for other in others) < limit


def test_a_sample_loses_the_same_elements_whatever_batch_it_is_in() -> None:
    keys = keys_of()
    together = dropped(keys)
    assert torch.equal(torch.cat([dropped(part) for part in keys.split([1, 40, 23])]), together)
    order = torch.randperm(SAMPLES)
    assert torch.equal(dropped(keys[order]), together[order])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_mask(dtype: torch.dtype) -> None:
    x = torch.randn(SAMPLES, *ELEMENTS, dtype=dtype, requires_grad=True)
    out = SampleDropout(0.2, 0, DropoutKeys(keys_of()))(x)
    out.sum().backward()
    expected = (~dropped(keys_of())).view(x.shape) * (1 / (1 - 0.2))
    assert out.dtype == dtype
    torch.testing.assert_close(out, x * expected.to(dtype))
    torch.testing.assert_close(x.grad, expected.to(dtype))


def test_rows_that_are_parts_of_a_sample_have_their_own_elements() -> None:
    module = SampleDropout(0.2, 0, DropoutKeys(keys_of()))
    windows = module(torch.ones(SAMPLES * 5, 10, 20))
    assert torch.equal((windows == 0).view(SAMPLES, -1), dropped(keys_of()))


def test_the_backward_pass_may_compute_it_again() -> None:
    module = nn.Sequential(SampleDropout(0.5, 0, DropoutKeys(keys_of())), nn.Linear(20, 3))
    x = torch.randn(SAMPLES, *ELEMENTS, requires_grad=True)
    plain, again = (
        torch.autograd.grad(run(x).square().sum(), x)[0]
        for run in (module, lambda y: checkpoint(module, y, use_reentrant=False, preserve_rng_state=False))
    )
    assert torch.equal(plain, again)


def test_without_keys_it_is_torchs_own() -> None:
    module, x = SampleDropout(0.5, 0, DropoutKeys()), torch.randn(4, 5)
    torch.manual_seed(3)
    expected = F.dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(module(x), expected)
    assert torch.equal(module.eval()(x), x)


def test_layers_are_replaced_where_they_are() -> None:
    model = nn.Sequential(nn.Dropout(0.1), nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.3)), nn.Dropout2d(0.2)).eval()
    keys = by_sample(model)
    one, two = model[0], model[1][1]  # type: ignore[index]
    assert isinstance(one, SampleDropout)
    assert isinstance(two, SampleDropout)
    assert (one.p, two.p, one.layer, two.layer, two.keys is keys) == (0.1, 0.3, 0, 1, True)
    assert not one.training
    assert type(model[2]) is nn.Dropout2d


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_drops_what_a_processor_does() -> None:
    keys = keys_of()
    assert torch.equal(dropped(keys), dropped(keys.cuda(), device="cuda").cpu())
