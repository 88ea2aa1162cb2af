"""Real images (characters in DejaVu's fonts), laid out as the data sets of the suites are found on disk.

Every data set has its own number of classes, and so few images that a whole suite is written in seconds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import datasets
import matplotlib
import numpy as np
import scipy.io
from PIL import Image, ImageDraw, ImageFont

from nostalgia.data.catalog import CATALOG
from nostalgia.data.imagenet import SUBSETS

SIZE = 32
TRAIN, VAL = 3, 1  # images a class
CHARACTERS = [chr(c) for c in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x1C0))]
FACES = ("Sans", "Serif", "SansMono", "Sans-Bold", "Serif-Bold", "SansMono-Bold")


@functools.lru_cache
def _font(face: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVu{face}.ttf", 22)


def glyph(label: int, number: int) -> Image.Image:
    """The ``label``-th character in the ``number``-th face, a little off the centre."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    at = (SIZE // 2 + number % 3 - 1, SIZE // 2 + number % 2)
    ImageDraw.Draw(image).text(at, CHARACTERS[label], "black", _font(FACES[number % len(FACES)]), anchor="mm")
    return image


def encoded(label: int, number: int, kind: str = "png") -> bytes:
    buffer = BytesIO()
    glyph(label, number).save(buffer, kind)
    return buffer.getvalue()


def classes(name: str) -> list[str]:
    """Class names of a catalog data set, WordNet ids where it has them; of a glyphs folder its twenty numbers."""
    if name not in CATALOG:
        return [f"{i:02d}" for i in range(20)]
    entry = CATALOG[name]
    if entry.domain is not None:  # the same in all six
        return [f"thing_{i + 1}" for i in range(entry.classes or 0)]
    if entry.wnids is not None:
        return list(SUBSETS[entry.wnids])
    if name in ("imagenet100", "tinyimagenet"):
        return list(SUBSETS["imagenet1k"][: entry.classes])
    return [f"{i + 1:03d}.{name}_{i + 1}" for i in range(entry.classes or 0)]


def _write(folder: Path, label: int, numbers: range, suffix: str = ".jpg", prefix: str = "") -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{prefix}{label:03d}_{number}{suffix}" for number in numbers]
    for path, number in zip(paths, numbers, strict=True):
        glyph(label, number).save(path)
    return paths


# -- class folders -----------------------------------------------------------------------------------------------------


def folders(root: Path, name: str) -> None:
    """``root/<name>/{train,val}/<class>/*``."""
    for label, class_name in enumerate(classes(name)):
        _write(root / name / "train" / class_name, label, range(TRAIN), ".png")
        _write(root / name / "val" / class_name, label, range(TRAIN, TRAIN + VAL), ".png")


# -- the hub -----------------------------------------------------------------------------------------------------------


def hub(root: Path, name: str) -> None:
    """``root/<name>/data/<split>-*.parquet``, with the columns and splits of the catalog's repository."""
    known = CATALOG[name].hub[0]
    names = [*classes(name), "clutter"] if name == "caltech256" else classes(name)
    text = known.label in ("text", "wnid")
    val = known.val or {"imagenet-r": None, "imagenet-a": None}.get(name, "test")
    splits = {split: range(TRAIN) for split in (known.train or "train").split("+")}
    if val is not None:
        splits[val] = range(TRAIN, TRAIN + VAL)
    image, label = known.image or "image", known.label or "label"
    text_feature = datasets.Value("string")
    features = {image: datasets.Image(), label: text_feature if text else datasets.ClassLabel(names=names)}
    if known.keep is not None:
        features[known.keep[0]] = text_feature
    (root / name / "data").mkdir(parents=True)
    for split, numbers in splits.items():
        rows = [(i, n) for i in range(len(names)) for n in numbers]
        columns = {
            image: [{"bytes": encoded(i, n), "path": None} for i, n in rows],
            label: [names[i] if text else i for i, _ in rows],
        }
        if known.keep is not None:
            columns[known.keep[0]] = [known.keep[1]] * len(rows)
        table = datasets.Dataset.from_dict(columns, datasets.Features(features))
        table.to_parquet(root / name / "data" / f"{split}-00000-of-00001.parquet")


# -- as torchvision, or the authors' own archive, leaves it ------------------------------------------------------------


def torchvision(root: Path, name: str) -> None:
    """What the data set's download unpacks to; checksums that torchvision compares with go to ``md5.json``."""
    ARCHIVES[name](root)


def _cifar(root: Path, name: str, folder: str, files: dict[str, range], key: str) -> None:
    count = CATALOG[name].classes or 0
    (root / folder).mkdir(parents=True)
    sums = {}
    names = {"fine_label_names" if key == "fine_labels" else "label_names": [str(i) for i in range(count)]}
    contents: dict[str, object] = {"meta" if key == "fine_labels" else "batches.meta": names}
    for file, numbers in files.items():
        rows = [(i, n) for n in numbers for i in range(count)]
        pixels = np.stack([np.asarray(glyph(i, n)).transpose(2, 0, 1).reshape(-1) for i, n in rows])
        contents[file] = {"data": pixels, key: [i for i, _ in rows]}
    for file, value in contents.items():
        data = pickle.dumps(value)
        (root / folder / file).write_bytes(data)
        sums[file] = hashlib.md5(data).hexdigest()
    _remember(root, name, sums)


def _idx(root: Path, name: str) -> None:
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for prefix, numbers in (("train", range(5)), ("t10k", range(5, 6))):
        rows = [(i, n) for n in numbers for i in range(10)]
        images = np.stack([np.asarray(glyph(i, n).convert("L").resize((28, 28))) for i, n in rows])
        for kind, array in (("images-idx3", images), ("labels-idx1", np.array([i for i, _ in rows], np.uint8))):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            (folder / f"{prefix}-{kind}-ubyte").write_bytes(header + array.tobytes())


def _svhn(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for split, numbers in (("train", range(5)), ("test", range(5, 6))):
        rows = [(i, n) for n in numbers for i in range(10)]
        pixels = np.stack([np.asarray(glyph(i, n)) for i, n in rows], axis=-1)  # (H, W, 3, N)
        labels = np.array([[i or 10] for i, _ in rows], np.uint8)  # the digit 0 has label 10
        scipy.io.savemat(root / f"{split}_32x32.mat", {"X": pixels, "y": labels})
    _remember(root, "svhn", {f: _md5(root / f) for f in ("train_32x32.mat", "test_32x32.mat")})


def _domain(root: Path, name: str) -> None:
    """One image of each class for each split, beside the domain's two lists."""
    domain, base = CATALOG[name].domain, root / "domainnet"
    for number, split in enumerate(("train", "test")):
        lines = []
        for label, class_name in enumerate(classes(name)):
            (path,) = _write(base / str(domain) / class_name, label, range(number, number + 1))
            lines.append(f"{path.relative_to(base)} {label}\n")
        (base / f"{domain}_{split}.txt").write_text("".join(lines))


def _eurosat(root: Path) -> None:
    for label, class_name in enumerate(classes("eurosat")):
        _write(root / "eurosat" / "2750" / class_name, label, range(TRAIN + VAL))


def _caltech256(root: Path) -> None:
    for label, class_name in enumerate([*classes("caltech256"), "257.clutter"]):
        _write(root / "caltech256" / "256_ObjectCategories" / class_name, label, range(TRAIN + VAL))


def _flowers102(root: Path) -> None:
    base, numbered = root / "flowers-102", []
    (base / "jpg").mkdir(parents=True)
    for number in range(4):
        for label in range(102):
            numbered.append((label, number))
            glyph(label, number).save(base / "jpg" / f"image_{len(numbered):05d}.jpg")
    scipy.io.savemat(base / "imagelabels.mat", {"labels": np.array([[label + 1 for label, _ in numbered]])})
    ids = np.arange(1, len(numbered) + 1)
    scipy.io.savemat(base / "setid.mat", {"trnid": [ids[:102]], "valid": [ids[102:204]], "tstid": [ids[204:]]})
    sums = {f: _md5(base / f) for f in ("imagelabels.mat", "setid.mat")}
    _remember(root, "flowers102", sums)


def _tinyimagenet(root: Path) -> None:
    base, lines = root / "tinyimagenet" / "tiny-imagenet-200", []
    for label, wnid in enumerate(classes("tinyimagenet")):
        _write(base / "train" / wnid / "images", label, range(TRAIN), ".JPEG", f"{wnid}_")
        (path,) = _write(base / "val" / "images", label, range(TRAIN, TRAIN + 1), ".JPEG", "val_")
        lines.append(f"{path.name}\t{wnid}\t0\t0\t{SIZE - 1}\t{SIZE - 1}\n")
    (base / "val" / "val_annotations.txt").write_text("".join(lines))
    (base / "wnids.txt").write_text("\n".join(classes("tinyimagenet")))


def _cub200(root: Path) -> None:
    base, lists = root / "cub200" / "CUB_200_2011", {"images": "", "image_class_labels": "", "train_test_split": ""}
    number = 0
    for label, class_name in enumerate(classes("cub200")):
        for place, path in enumerate(_write(base / "images" / class_name, label, range(TRAIN + VAL))):
            number += 1
            lists["images"] += f"{number} {class_name}/{path.name}\n"
            lists["image_class_labels"] += f"{number} {label + 1}\n"
            lists["train_test_split"] += f"{number} {int(place < TRAIN)}\n"
    lists["classes"] = "".join(f"{i + 1} {name}\n" for i, name in enumerate(classes("cub200")))
    for file, text in lists.items():
        (base / f"{file}.txt").write_text(text)


def _wnid_folders(name: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        for label, wnid in enumerate(classes(name)):
            _write(root / name / wnid, label, range(TRAIN + VAL))

    return write


ARCHIVES: dict[str, Callable[[Path], None]] = {
    "cifar10": lambda root: _cifar(
        root,
        "cifar10",
        "cifar-10-batches-py",
        {**{f"data_batch_{i + 1}": range(i, i + 1) for i in range(5)}, "test_batch": range(5, 6)},
        "labels",
    ),
    "cifar100": lambda root: _cifar(
        root, "cifar100", "cifar-100-python", {"train": range(TRAIN), "test": range(TRAIN, 4)}, "fine_labels"
    ),
    "mnist": lambda root: _idx(root, "MNIST"),
    "fashion_mnist": lambda root: _idx(root, "FashionMNIST"),
    "svhn": _svhn,
    "eurosat": _eurosat,
    **{name: functools.partial(_domain, name=name) for name, entry in CATALOG.items() if entry.domain},
    "caltech256": _caltech256,
    "flowers102": _flowers102,
    "tinyimagenet": _tinyimagenet,
    "cub200": _cub200,
    "imagenet100": lambda root: folders(root, "imagenet100"),
    "imagenet-r": _wnid_folders("imagenet-r"),
    "imagenet-a": _wnid_folders("imagenet-a"),
}
LAYOUTS = {"hub": hub, "torchvision": torchvision, "folders": folders}


def write(layout: str, root: Path, name: str) -> None:
    """A data set of the catalog in a layout, or a set of glyphs, which has but one, under ``root/glyphs``."""
    if name in CATALOG:
        LAYOUTS[layout](root, name)
    else:
        folders(root / "glyphs", name)


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def _remember(root: Path, name: str, sums: dict[str, str]) -> None:
    (root / f"{name}.md5.json").write_text(json.dumps(sums))


def accept_checksums(root: Path) -> None:
    """Make torchvision compare with the checksums of the files written here, for this process."""
    import torchvision.datasets as tv

    for name, kind in (("cifar10", tv.CIFAR10), ("cifar100", tv.CIFAR100)):
        if (root / f"{name}.md5.json").is_file():
            sums = json.loads((root / f"{name}.md5.json").read_text())
            kind.train_list = [[file, sums[file]] for file, _ in kind.train_list]
            kind.test_list = [[file, sums[file]] for file, _ in kind.test_list]
            kind.meta = {**kind.meta, "md5": sums[kind.meta["filename"]]}
    if (root / "svhn.md5.json").is_file():
        sums = json.loads((root / "svhn.md5.json").read_text())
        known_splits = tv.SVHN.split_list
        tv.SVHN.split_list = {s: [url, file, sums.get(file, md5)] for s, (url, file, md5) in known_splits.items()}
    if (root / "flowers102.md5.json").is_file():
        sums = json.loads((root / "flowers102.md5.json").read_text())
        known = tv.Flowers102._file_dict
        tv.Flowers102._file_dict = {key: (file, sums.get(file, md5)) for key, (file, md5) in known.items()}
