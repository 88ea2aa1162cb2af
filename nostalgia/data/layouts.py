"""What data sets look like as their authors packed them: Tiny-ImageNet, CUB-200-2011, DomainNet."""

from __future__ import annotations

import os
from pathlib import Path

from nostalgia.data.folders import images_by_name, scan
from nostalgia.data.images import FileImages
from nostalgia.errors import NotFoundError

Splits = tuple[FileImages, FileImages | None]


def recognised(name: str, folder: Path, domain: str | None) -> Splits | None:
    """The splits of ``folder`` where it has one of these layouts."""
    if (folder / "val" / "val_annotations.txt").is_file():
        return tiny_imagenet(name, folder)
    if all((folder / f).is_file() for f in ("images.txt", "image_class_labels.txt", "train_test_split.txt")):
        return cub(name, folder)
    if domain is not None and (folder / f"{domain}_train.txt").is_file():
        return domainnet(name, folder, domain)
    return None


def tiny_imagenet(name: str, folder: Path) -> Splits:
    """``train/<wnid>/images/*``, ``val/images/*``, ``val/val_annotations.txt``: file, wnid, box by tabs."""
    train = scan(name, folder / "train")
    images = folder / "val" / "images"
    present = images_by_name(images if images.is_dir() else folder / "val")
    index = {wnid: i for i, wnid in enumerate(train.classes)}
    annotations = folder / "val" / "val_annotations.txt"
    paths, labels = [], []
    for number, line in enumerate(_lines(annotations), 1):
        file, wnid = (line + "\t").split("\t")[:2]
        if wnid not in index:
            raise NotFoundError(f"{annotations}, line {number}: {wnid!r} is not a class of {folder / 'train'}")
        if file not in present:
            raise NotFoundError(f"{annotations}, line {number}: {file!r} is not there in {images}")
        paths.append(present[file])
        labels.append(index[wnid])
    return train, FileImages(name, paths, labels, train.classes)


def cub(name: str, folder: Path) -> Splits:
    """``images.txt``, ``image_class_labels.txt``, ``train_test_split.txt``, ``classes.txt``."""
    files = _table(folder / "images.txt")
    labels = _table(folder / "image_class_labels.txt")
    in_train = _table(folder / "train_test_split.txt")
    names = _table(folder / "classes.txt") if (folder / "classes.txt").is_file() else {}
    numbers = sorted(set(labels.values()), key=lambda number: _class_number(number, folder))
    classes = [names.get(number, number) for number in numbers]
    index = {number: position for position, number in enumerate(numbers)}
    splits: tuple[list[str], list[str]] = ([], [])
    targets: tuple[list[int], list[int]] = ([], [])
    for image, file in files.items():
        if image not in labels or image not in in_train:
            raise NotFoundError(f"{folder}: image {image} of images.txt has no label or no split; unpack it again")
        part = 0 if in_train[image] == "1" else 1
        splits[part].append(_inside(folder / "images", file, folder / "images.txt"))
        targets[part].append(index[labels[image]])
    train, val = (FileImages(name, *split, classes) for split in zip(splits, targets, strict=True))
    _must_exist(train)
    return train, val


def domainnet(name: str, folder: Path, domain: str) -> Splits:
    """``<domain>_{train,test}.txt``: "<domain>/<class>/<file> <label>" lines, the files below ``folder``."""
    names: dict[int, str] = {}
    lists: list[tuple[list[str], list[int]]] = []
    for split in ("train", "test"):
        source = folder / f"{domain}_{split}.txt"
        paths: list[str] = []
        labels: list[int] = []
        for number, line in enumerate(_lines(source), 1):
            file, _, label = line.rpartition(" ")
            parts = file.split("/")
            if not (label.isascii() and label.isdigit()) or len(parts) < 3:
                raise NotFoundError(f"{source}, line {number}: {line[:80]!r} is not '<domain>/<class>/<file> <label>'")
            known = names.setdefault(int(label), parts[-2])
            if known != parts[-2]:
                raise NotFoundError(f"{source}, line {number}: label {label} is both {known!r} and {parts[-2]!r}")
            paths.append(_inside(folder, file, source))
            labels.append(int(label))
        lists.append((paths, labels))
    order = sorted(names)
    index = {label: position for position, label in enumerate(order)}
    classes = [names[label] for label in order]
    train, val = (FileImages(name, paths, [index[v] for v in labels], classes) for paths, labels in lists)
    _must_exist(train)
    return train, val


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NotFoundError(f"{path}: cannot be read ({error}); unpack the data set again") from None
    return [line.strip("\r") for line in text.split("\n") if line.strip()]


def _table(path: Path) -> dict[str, str]:
    """Lines of "<id> <value>" as a mapping, in their order."""
    table = {}
    for number, line in enumerate(_lines(path), 1):
        key, _, value = line.strip().partition(" ")
        if not value:
            raise NotFoundError(f"{path}, line {number}: {line[:80]!r} is not '<id> <value>'")
        table[key] = value
    return table


def _class_number(text: str, folder: Path) -> int:
    if not (text.isascii() and text.isdigit()):
        raise NotFoundError(f"{folder / 'image_class_labels.txt'}: {text[:80]!r} is not a class number")
    return int(text)


def _inside(folder: Path, file: str, source: Path) -> str:
    """The path of a listed file; a list that points out of its own folder is refused."""
    if os.path.isabs(file) or ".." in file.split("/"):
        raise NotFoundError(f"{source}: {file[:80]!r} lies outside {folder}; unpack the data set again")
    return os.path.join(folder, file)


def _must_exist(images: FileImages) -> None:
    """A list without its images is a data set half unpacked: said before training, not in its middle."""
    if len(images) > 0 and not os.path.isfile(images.describe(0)):
        raise NotFoundError(f"{images.describe(0)}: listed, but not there; unpack the images beside the lists")
