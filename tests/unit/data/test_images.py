"""Decoding: every kind of image becomes 3-channel uint8, and a broken one is named."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nostalgia.data.images import ArrayImages, FileImages, Joined, Subset, to_rgb
from nostalgia.errors import NotFoundError
from tests.unit.data.trees import digit


def test_every_mode_becomes_rgb() -> None:
    grey = np.array([[0, 255], [128, 64]], dtype=np.uint8)
    colour = np.repeat(grey[:, :, None], 3, axis=2)
    images = {
        "grey": Image.fromarray(grey),
        "16 bit": Image.fromarray(grey.astype(np.uint16) * 257),
        "32 bit": Image.fromarray(grey.astype(np.int32) * 257),
        "32 bit holding 8": Image.fromarray(grey.astype(np.int32)),
        "float": Image.fromarray(grey.astype(np.float32)),
        "opaque": Image.merge("RGBA", [*[Image.fromarray(grey)] * 3, Image.new("L", (2, 2), 255)]),
        "grey and alpha": Image.merge("LA", [Image.fromarray(grey), Image.new("L", (2, 2), 255)]),
        "palette": Image.fromarray(colour).convert("P", palette=Image.Palette.ADAPTIVE),
        "cmyk": Image.fromarray(colour).convert("CMYK"),
    }
    for name, image in images.items():
        found = to_rgb(image)
        assert found.mode == "RGB", name
        assert np.abs(np.asarray(found).astype(int) - colour).max() <= 1, name


def test_a_dark_16_bit_image_stays_dark() -> None:
    dark = Image.fromarray(np.full((2, 2), 200, dtype=np.uint16))
    assert np.asarray(to_rgb(dark)).max() == 1  # 200 / 65535, not 200 / 255


def test_transparent_pixels_are_white() -> None:
    assert np.asarray(to_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))).min() == 255


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(NotFoundError, match=r"broken\.png: not a readable image") as caught:
        FileImages("x", [str(path)], [0], ["a"]).image(0)
    assert "\n" not in str(caught.value)


def test_a_truncated_jpeg_and_a_missing_file_are_named(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jpg", tmp_path / "cut.jpg"
    digit(3, 0, size=64).save(whole)
    cut.write_bytes(whole.read_bytes()[:500])
    images = FileImages("x", [str(whole), str(cut), str(tmp_path / "gone.jpg")], [0, 0, 0], ["a"])
    assert images.image(0).shape == (3, 64, 64)
    for index, name in ((1, r"cut\.jpg"), (2, r"gone\.jpg")):
        with pytest.raises(NotFoundError, match=name):
            images.image(index)


def test_paths_survive_odd_names_and_pickling(tmp_path: Path) -> None:
    names = ["ä ö.png", "long " * 20 + ".png", "😀.png", "a\nb.png", "\udcff.png"]
    images = FileImages("x", [str(tmp_path / n) for n in names], [0] * 5, ["a"])
    again = pickle.loads(pickle.dumps(images))
    assert [again.describe(i) for i in range(5)] == [str(tmp_path / n) for n in names]


def test_a_large_jpeg_may_be_decoded_smaller_but_not_too_small(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    digit(5, 0).resize((400, 300), Image.Resampling.BICUBIC).save(path, quality=95)
    images = FileImages("x", [str(path)], [0], ["a"])
    assert images.image(0).shape == (3, 300, 400)
    assert images.image(0, 100).shape == (3, 150, 200)
    assert images.image(0, 151).shape == (3, 300, 400)


def test_array_images_one_by_one_and_in_batches() -> None:
    grey = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
    colour = np.stack([grey, grey + 1, grey + 2], axis=-1)
    for data, blue in ((grey, 17), (colour, 19)):
        images = ArrayImages("x", data, [0, 1], ["a", "b"])
        batch = images.batch(torch.tensor([1, 0]))
        assert batch.shape == (2, 3, 4, 4)
        assert torch.equal(batch[0], images.image(1))
        assert batch[0, 2, 0, 1] == blue


def test_subset_relabels_in_the_given_order() -> None:
    data = ArrayImages("x", np.arange(6, dtype=np.uint8)[:, None, None], [0, 1, 2, 0, 1, 2], ["a", "b", "c"])
    part = Subset(data, torch.tensor([2, 3, 5]), [2, 0])
    assert part.classes == ("c", "a")
    assert part.labels.tolist() == [0, 1, 0]
    assert [int(part.image(i).max()) for i in range(3)] == [2, 3, 5]
    assert part.batch(torch.tensor([1])).flatten().tolist() == [3, 3, 3]


def test_joined_parts_keep_their_order() -> None:
    first = ArrayImages("x", np.array([[[1]], [[2]]], dtype=np.uint8), [0, 1], ["a", "b"])
    second = ArrayImages("y", np.array([[[3]]], dtype=np.uint8), [1], ["a", "b"])
    joined = Joined([first, second])
    assert [int(joined.image(i).max()) for i in range(3)] == [1, 2, 3]
    assert joined.labels.tolist() == [0, 1, 1]
    assert joined.describe(2) == "y[0]"
