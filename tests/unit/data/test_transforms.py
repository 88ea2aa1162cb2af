"""Resizing, domain shifts and augmentation."""

from __future__ import annotations

import pytest
import torch

from nostalgia.data.catalog import AUGMENTATIONS, CATALOG
from nostalgia.data.resizing import Resizing
from nostalgia.data.transforms import SHIFTS, Augmentation, check_shifts, random_view, shift, uniform
from nostalgia.errors import UsageError


@pytest.fixture
def photo() -> torch.Tensor:
    """An image (3, 12, 20) without symmetry."""
    return torch.randint(0, 256, (3, 12, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_the_central_square_is_resized(photo: torch.Tensor) -> None:
    assert torch.equal(Resizing(12)(photo), photo[:, :, 4:16])
    assert torch.equal(Resizing(12)(photo.mT), photo.mT[:, 4:16])
    assert torch.equal(Resizing(12)(photo[:, :, :19]), photo[:, :, 3:15])  # an odd pixel is left on the right
    for size in (2, 5, 24):
        small = Resizing(size)(photo)
        assert (small.shape, small.dtype) == ((3, size, size), torch.uint8)
    flat = Resizing(16)(torch.full((3, 7, 3000), 77, dtype=torch.uint8))
    assert flat.unique().tolist() == [77]
    strip = Resizing(224)(torch.full((3, 1, 50_000), 77, dtype=torch.uint8))  # whole, it would be 7 GB
    assert strip.shape == (3, 224, 224)
    assert strip.unique().tolist() == [77]


@pytest.mark.parametrize("stretch", [False, True])
def test_a_part_is_cut_from_what_evaluation_sees(stretch: bool) -> None:
    """Of a ramp, a part of side 1 is the whole view, and a smaller one lies within it; both to a grey level or two."""
    ramp = torch.arange(40, 240).to(torch.uint8).expand(3, 150, 200)
    resizing = Resizing(100, 128, stretch)
    whole = resizing(ramp).long()
    assert (resizing.part(ramp, 1.0, 0.0, 0.0).long() - whole).abs().max() <= 2
    small = resizing.part(ramp, 0.5, 1.0, 0.0).long()  # its right half
    assert abs(int(small[0, 0, -1]) - int(whole[0, 0, -1])) <= 2
    assert abs(int(small[0, 0, 0]) - int(whole[0, 0, 50])) <= 2


def test_each_shift_does_what_it_says(photo: torch.Tensor) -> None:
    plain = Resizing(12)(photo).long()
    found = {name: shift(Resizing(12)(photo), [name]).long() for name in SHIFTS}
    assert torch.equal(found["invert"], 255 - plain)
    assert torch.equal(found["rotate90"][:, -1, :], plain[:, :, 0])  # counterclockwise: the left edge lies below
    assert torch.equal(found["rotate180"], plain.flip(-1).flip(-2))
    assert torch.equal(found["rotate270"], found["rotate90"].flip(-1).flip(-2))
    assert torch.equal(found["flip_horizontal"], plain.flip(-1))
    assert torch.equal(found["flip_vertical"], plain.flip(-2))
    assert torch.equal(found["grayscale"][0], found["grayscale"][2])
    grey = 0.2989 * plain[0] + 0.587 * plain[1] + 0.114 * plain[2]
    assert (found["grayscale"][1] - grey).abs().max() <= 1
    assert found["blur"].double().std() < plain.double().std() / 2
    assert torch.equal(shift(Resizing(12)(photo), ["invert", "rotate90"]).long(), 255 - found["rotate90"])


def test_permutations_are_fixed_and_differ_by_number(photo: torch.Tensor) -> None:
    plain, zero, one = (shift(Resizing(12)(photo), s) for s in ([], ["permute"], ["permute1"]))
    assert torch.equal(zero, shift(plain, ["permute0"]))
    assert not torch.equal(zero, one)
    for shuffled in (zero, one):
        assert torch.equal(shuffled.flatten(1).sort().values, plain.flatten(1).sort().values)
    both = shift(torch.stack([plain, 255 - plain]), ["permute1"])
    assert torch.equal(both[0], one)
    assert torch.equal(both[1], 255 - one)


@pytest.mark.parametrize("name", ["invrt", "permute-1", "rotate45", "", 3, None, "permute\N{FULLWIDTH DIGIT ONE}"])
def test_unknown_shifts_are_refused(name: object) -> None:
    with pytest.raises(UsageError, match="allowed are invert"):
        check_shifts([name])  # type: ignore[list-item]


def test_the_nearest_shift_is_named() -> None:
    with pytest.raises(UsageError, match=r"did you mean rotate90\?"):
        check_shifts(["rotate_90"])


# -- augmentation -----------------------------------------------------------------------------------------------------


def augment(policy: str, images: torch.Tensor, samples: torch.Tensor, epoch: int = 1, seed: int = 0) -> torch.Tensor:
    return Augmentation([policy], seed).batch(images.clone(), samples, torch.zeros_like(samples), epoch)


@pytest.fixture
def batch() -> torch.Tensor:
    return torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("policy", ["flip", "crop_flip", "shift"])
def test_a_row_depends_on_its_sample_alone(policy: str, batch: torch.Tensor) -> None:
    samples = torch.arange(64) * 1000
    whole = augment(policy, batch, samples)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))[:7]
    assert torch.equal(augment(policy, batch[order], samples[order]), whole[order])
    assert not torch.equal(whole, batch)
    assert torch.equal(whole, augment(policy, batch, samples))
    assert not torch.equal(whole, augment(policy, batch, samples, epoch=2))
    assert not torch.equal(whole, augment(policy, batch, samples, seed=1))


def test_flip_flips_half_of_them(batch: torch.Tensor) -> None:
    flipped = augment("flip", batch, torch.arange(64))
    same = (flipped == batch).flatten(1).all(1)
    mirrored = (flipped == batch.flip(-1)).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert 20 <= int(mirrored.sum()) <= 44


def test_shift_moves_whole_pixels_and_never_mirrors(batch: torch.Tensor) -> None:
    shifted = augment("shift", batch, torch.arange(64))
    for before, after in zip(batch, shifted, strict=True):
        # Up to two pixels of sixteen, the border repeated: exactly one of 25 translations.
        padded = torch.nn.functional.pad(before, (2, 2, 2, 2), mode="replicate")
        moves = [padded[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
        assert min(float((after - m).abs().max()) for m in moves) < 1e-9


def test_crops_lie_inside_the_image_and_cover_at_least_its_part() -> None:
    column = torch.linspace(0, 1, 64, dtype=torch.float64).expand(200, 3, 64, 64).contiguous()
    views = augment("crop_flip", column, torch.arange(200))
    spans = views[:, 0, 0].amax(1) - views[:, 0, 0].amin(1)
    assert float(views.min()) >= 0
    assert float(views.max()) <= 1
    assert float(spans.min()) > 0.6**0.5 - 0.04
    assert float(spans.max()) > 0.95
    assert 0.3 < float((views[:, 0, 0, 0] > views[:, 0, 0, -1]).double().mean()) < 0.7


@pytest.mark.parametrize("policy", AUGMENTATIONS)
def test_one_image_gets_the_view_it_gets_in_a_batch(policy: str) -> None:
    ramp = torch.linspace(0, 255, 32).round()  # smooth: a crop of it is the same whatever the interpolation
    images = torch.stack([ramp.expand(32, 32), ramp.expand(32, 32).T, ramp.flip(0).expand(32, 32)]).to(torch.uint8)
    images = images.expand(64, 3, 32, 32)
    samples = torch.arange(64)
    together = augment(policy, images.double() / 255, samples) * 255
    draws = Augmentation([policy], 0).draws(samples, 1).tolist()
    one_by_one = torch.stack([random_view(i, Resizing(32), policy, d) for i, d in zip(images, draws, strict=True)])
    assert (together - one_by_one).abs().max() < (16 if policy == "crop_flip" else 1e-6)  # 8 brightness steps a pixel


def test_a_crop_of_a_photo_is_taken_from_its_central_square(photo: torch.Tensor) -> None:
    square = photo[:, :, 4:16].long()
    for left, top in ((0.0, 0.0), (0.999, 0.0), (0.0, 0.999)):
        view = random_view(photo, Resizing(9), "crop_flip", [0.0, left, top, 0.9])  # the smallest: 9 of 12 pixels
        x, y = round(3 * left), round(3 * top)
        assert torch.equal(view.long(), square[:, y : y + 9, x : x + 9])
    mirrored = random_view(photo, Resizing(9), "crop_flip", [0.0, 0.0, 0.0, 0.1])
    assert torch.equal(mirrored.long(), square[:, :9, :9].flip(-1))


def test_policies_by_data_set(batch: torch.Tensor) -> None:
    samples, tasks = torch.arange(64), torch.arange(64) % 2
    mixed = Augmentation(["none", "flip"], 0).batch(batch.clone(), samples, tasks, 1)
    assert torch.equal(mixed[tasks == 0], batch[tasks == 0])
    assert torch.equal(mixed[tasks == 1], augment("flip", batch, samples)[tasks == 1])


def test_digits_are_never_mirrored_and_every_policy_is_known() -> None:
    for name in ("digits", "mnist", "svhn"):
        assert CATALOG[name].augment == "shift"
    assert {entry.augment for entry in CATALOG.values()} <= set(AUGMENTATIONS)
    with pytest.raises(UsageError, match="allowed are default, none"):
        Augmentation(["mixup"], 0)


def test_augmentation_numbers_are_uniform_and_distinct() -> None:
    draws = uniform(3, 1, torch.arange(20000), 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    torch.testing.assert_close(draws.mean(0), torch.full((4,), 0.5, dtype=torch.float64), atol=0.01, rtol=0)
    torch.testing.assert_close(draws.std(0), torch.full((4,), 12**-0.5, dtype=torch.float64), atol=0.01, rtol=0)
    assert torch.corrcoef(torch.cat([draws[1:], draws[:-1]], 1).T).triu(1).abs().max() < 0.03
    assert torch.equal(uniform(3, 1, torch.tensor([7]), 4)[0], draws[7])


def test_the_hash_is_splitmix64() -> None:
    from nostalgia.data.transforms import _mix

    # First output of the reference implementation (prng.di.unimi.it/splitmix64.c) for the state 0.
    assert int(_mix(torch.tensor([0]))) % (1 << 64) == 0xE220A8397B1DCDAF
