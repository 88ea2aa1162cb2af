"""scikit-learn's digits and MNIST's idx files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from nostalgia.data.sources import load_source
from nostalgia.errors import NotFoundError

FASHION = Path("/usr/share/datasets/fashion-mnist")


def idx_bytes(array: np.ndarray) -> bytes:
    shape = np.array(array.shape, dtype=">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + shape + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, packed: bool = False, classes: int = 10) -> Path:
    """Digits as MNIST's four files: 300 to train, 100 to validate."""
    folder.mkdir(parents=True, exist_ok=True)
    data = load_digits(n_class=classes)
    images = (data.images * (255 / 16)).round()
    for prefix, part in {"train": slice(0, 300), "t10k": slice(300, 400)}.items():
        for kind, array in (("images-idx3", images[part]), ("labels-idx1", data.target[part])):
            path = folder / f"{prefix}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(idx_bytes(array)) if packed else idx_bytes(array))
    return folder


def test_digits_are_all_there_and_split_the_same_way_every_time() -> None:
    first, second = load_source("digits"), load_source("digits")
    assert (first.kind, len(first.train), len(first.val)) == ("embedded", 1438, 359)
    assert first.val.labels.tolist() == second.val.labels.tolist()
    assert first.val.labels.bincount().min() >= 34
    # Brightness 0 to 16 becomes 0 to 255; nothing is lost and no image is in both splits.
    total = sum(int(split.image(i)[0].long().sum()) for split in (first.train, first.val) for i in range(len(split)))
    assert total == int((load_digits().images * (255 / 16)).round().sum())


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("place", ["mnist", ".", "MNIST/raw", "mnist/MNIST/raw"])
def test_idx_files_where_they_are_found(tmp_path: Path, place: str, packed: bool) -> None:
    write_idx(tmp_path / place, packed)
    source = load_source("mnist", root=tmp_path, download=False)
    assert source.kind == ("torchvision" if "raw" in place else "folder")
    assert (len(source.train), len(source.val)) == (300, 100)
    assert source.train.labels.tolist() == load_digits().target[:300].tolist()
    assert source.train.image(0).shape == (3, 8, 8)


def test_a_folder_of_idx_files_by_path(tmp_path: Path) -> None:
    source = load_source(str(write_idx(tmp_path / "my-digits", classes=7)))
    assert source.name == "my-digits"
    assert source.train.classes == tuple("0123456")


@pytest.mark.skipif(not FASHION.is_dir(), reason=f"needs {FASHION} (Debian's dataset-fashion-mnist)")
def test_fashion_mnist_as_debian_installs_it() -> None:
    for source in (load_source(str(FASHION)), load_source("fashion_mnist", root=FASHION.parent, download=False)):
        assert (len(source.train), len(source.val)) == (60000, 10000)
        assert source.train.classes[9] == "Ankle boot"
        assert source.train.labels[:4].tolist() == [9, 0, 0, 3]
        assert source.augment == "flip"


def break_file(path: Path, how: str) -> None:
    data = path.read_bytes()
    path.unlink()
    if how != "gone":
        path.write_bytes({"cut": data[: len(data) // 2], "start": b"\1" + data[1:], "tiny": data[:2]}[how])


@pytest.mark.parametrize("how", ["cut", "start", "tiny", "gone"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_a_partial_copy_is_told_from_an_absent_one(tmp_path: Path, how: str, packed: bool) -> None:
    folder = write_idx(tmp_path / "mnist", packed)
    break_file(folder / f"t10k-labels-idx1-ubyte{'.gz' if packed else ''}", how)
    expected = "is missing beside the others" if how == "gone" else "broken or partial"
    with pytest.raises(NotFoundError, match=rf"t10k-labels-idx1-ubyte.*{expected}"):
        load_source("mnist", root=tmp_path, download=False)
    with pytest.raises(NotFoundError, match="not there"):
        load_source("mnist", root=tmp_path / "elsewhere", download=False)


def test_labels_out_of_range_and_counts_that_differ(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "mnist")
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.full(100, 10)))
    with pytest.raises(NotFoundError, match=r"label 10 in t10k-labels is out of range; mnist has 10 classes, 0 to 9"):
        load_source("mnist", root=tmp_path, download=False)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(99)))
    with pytest.raises(NotFoundError, match="100 t10k images but 99 labels"):
        load_source("mnist", root=tmp_path, download=False)
