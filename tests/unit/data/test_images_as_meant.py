"""Images and folders are read as people mean them: orientation, ranges of values, names, orders, wrappers."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nostalgia.data.images import decode
from nostalgia.data.sources import load_source
from nostalgia.errors import NotFoundError
from tests.unit.data.trees import write_class, write_tree

#: What each EXIF orientation asks a viewer to do with the stored pixels, in NumPy's words.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_an_image_is_turned_as_its_orientation_says(tmp_path: Path, orientation: int, ending: str) -> None:
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :16] = (250, 0, 0)
    stored[8:, 16:] = (0, 0, 250)
    image, exif = Image.fromarray(stored), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"x.{ending}", exif=exif, **({"lossless": True} if ending == "webp" else {}))
    found = decode(str(tmp_path / f"x.{ending}"), "x", None).permute(1, 2, 0).numpy()
    expected = UPRIGHT[orientation](stored)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int))[2:-2:8, 2:-2:8].max() < 40  # JPEG is not exact


def floats(folder: Path, name: str, value: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, np.float32)).save(folder / f"{name}.tif")


@pytest.mark.parametrize(("white", "dark"), [(1.0, 0.2), (255.0, 51.0), (60000.0, 13107.0)])
def test_a_dark_image_of_real_numbers_stays_dark_beside_a_bright_one(tmp_path: Path, white: float, dark: float) -> None:
    for c in ("a", "b"):
        floats(tmp_path / "x" / c, "bright", white)
        floats(tmp_path / "x" / c, "dark", dark)
        floats(tmp_path / "x" / c, "dark2", dark)
    source = load_source(str(tmp_path / "x"), val_fraction=0.1)
    base = source.train.base  # type: ignore[attr-defined]
    shades = {int(base.image(i).max()) for i in range(len(base)) if "dark" in Path(base.describe(i)).name}
    assert shades == {51}


def test_pixels_that_are_not_numbers_or_out_of_every_range_are_refused_by_name(tmp_path: Path) -> None:
    for value, message in (
        (float("nan"), "not numbers"),
        (-1.0, "below zero"),
        (1e9, "intensities up to 1, 255 and 65535"),
    ):
        floats(tmp_path, "odd", value)
        with pytest.raises(NotFoundError, match=message) as caught:
            decode(str(tmp_path / "odd.tif"), "odd.tif", None)
        assert "odd.tif" in str(caught.value)


def test_sixteen_bit_grey_is_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 65535 // 5, np.uint16)).save(tmp_path / "x.png")
    assert decode(str(tmp_path / "x.png"), "x", None).unique().tolist() == [51]


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "LA", "RGBA"])
def test_other_modes_are_what_a_viewer_shows(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (4, 4), (200, 200, 200)).convert(mode)
    ending = "tif" if mode == "CMYK" else "png"
    image.save(tmp_path / f"x.{ending}")
    found = decode(str(tmp_path / f"x.{ending}"), "x", None)
    expected = 255 if mode == "1" else 200
    assert int((found.int() - expected).abs().max()) < (256 if mode == "1" else 8)


@pytest.mark.parametrize(
    ("train", "val"), [("Train", "Test"), ("TRAIN", "VAL"), ("training", "testing"), ("Train", "dev")]
)
def test_split_folders_are_known_in_any_case(tmp_path: Path, train: str, val: str) -> None:
    source = load_source(str(write_tree(tmp_path / "mine", ("a", "b"), names=(train, val))))
    assert source.train.classes == ("a", "b")
    assert (len(source.train), len(source.val)) == (12, 6)


def test_a_folder_around_all_of_it_is_seen_through(tmp_path: Path) -> None:
    write_tree(tmp_path / "outer" / "inner", ("a", "b"))
    assert load_source(str(tmp_path / "outer")).train.classes == ("a", "b")
    for c in ("a", "b", "c"):
        write_class(tmp_path / "other" / "photos" / c, 1, 4)
    assert load_source(str(tmp_path / "other")).train.classes == ("a", "b", "c")


def test_a_single_class_is_refused_unless_asked_for(tmp_path: Path) -> None:
    write_class(tmp_path / "mine" / "only", 1, 6)
    with pytest.raises(NotFoundError, match="a single class, 'only'"):
        load_source(str(tmp_path / "mine"))
    entries = {"one": {"path": str(tmp_path / "mine"), "classes": 1}}
    assert load_source("one", entries=entries).train.classes == ("only",)


def test_classes_named_by_numbers_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    for c in ("10", "2", "0", "1"):
        write_class(tmp_path / "mine" / c, 1, 4)
    assert load_source(str(tmp_path / "mine")).train.classes == ("0", "1", "2", "10")
    write_class(tmp_path / "mine" / "x", 1, 4)
    assert load_source(str(tmp_path / "mine")).train.classes == ("0", "1", "10", "2", "x")


def test_names_that_are_not_utf_8_or_the_same_in_unicode_are_refused_before_training(tmp_path: Path) -> None:
    write_class(tmp_path / "mine" / "a", 1, 4)
    os.makedirs(os.fsencode(tmp_path / "mine") + b"/caf\xe9")
    with pytest.raises(NotFoundError, match=r"'caf\\xe9' has a name that is not UTF-8") as caught:
        load_source(str(tmp_path / "mine"))
    str(caught.value).encode()
    twins = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    for c in (*twins, "b"):
        write_class(tmp_path / "twins" / c, 1, 4)
    with pytest.raises(NotFoundError, match="composed and one in decomposed Unicode"):
        load_source(str(tmp_path / "twins"))


def test_splits_may_spell_a_class_in_both_unicode_forms(tmp_path: Path) -> None:
    for split, form in (("train", "NFC"), ("val", "NFD")):
        for c in (unicodedata.normalize(form, "é"), "b"):
            write_class(tmp_path / "mine" / split / c, 1, 4)
    source = load_source(str(tmp_path / "mine"))
    assert source.train.classes == source.val.classes == ("b", "é")


@pytest.mark.parametrize("ending", ["gif", "bmp", "ppm", "tiff", "jfif"])
def test_further_formats_are_read(tmp_path: Path, ending: str) -> None:
    for c in ("a", "b"):
        (tmp_path / "mine" / c).mkdir(parents=True)
        for i in range(3):
            kind = {"format": "JPEG"} if ending == "jfif" else {}
            Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(tmp_path / "mine" / c / f"{i}.{ending}", **kind)
    source = load_source(str(tmp_path / "mine"))
    assert source.train.image(0).shape == (3, 8, 8)
    assert source.train.image(0).dtype == torch.uint8
