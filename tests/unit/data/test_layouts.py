"""Data sets as their authors packed them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nostalgia.data.catalog import CATALOG
from nostalgia.data.imagenet import SUBSETS, WNIDS
from nostalgia.data.sources import load_source
from nostalgia.errors import NotFoundError
from tests.unit.data.trees import digit, write_class, write_tree


@pytest.fixture
def any_class_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalog's entries without their number of classes, which small trees do not have."""
    for name, entry in CATALOG.items():
        monkeypatch.setitem(CATALOG, name, replace(entry, classes=None))


def tiny_imagenet(folder: Path) -> Path:
    wnids = ["n01443537", "n01629819", "n01641577"]
    lines = []
    for label, wnid in enumerate(wnids):
        write_class(folder / "train" / wnid / "images", label, 4, suffix=".JPEG")
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("x\t0\t0\t1\t1\n")
        for number in range(2):
            name = f"val_{2 * (2 - label) + number}.JPEG"  # not in the order of the classes
            (folder / "val" / "images").mkdir(parents=True, exist_ok=True)
            digit(label, 10 + number).save(folder / "val" / "images" / name)
            lines.append(f"{name}\t{wnid}\t0\t32\t44\t62")
    (folder / "test" / "images").mkdir(parents=True)
    digit(0, 20).save(folder / "test" / "images" / "test_0.JPEG")
    (folder / "wnids.txt").write_text("\n".join(wnids))
    (folder / "val" / "val_annotations.txt").write_text("\n".join(sorted(lines)) + "\n")
    return folder


@pytest.mark.usefixtures("any_class_count")
@pytest.mark.parametrize("where", ["tinyimagenet", "tiny-imagenet-200", "tinyimagenet/tiny-imagenet-200"])
def test_tiny_imagenet_reads_its_annotations(tmp_path: Path, where: str) -> None:
    tiny_imagenet(tmp_path / where)
    source = load_source("tinyimagenet", root=tmp_path, download=False)
    assert (source.kind, len(source.train), len(source.val)) == ("folder", 12, 6)
    found = {source.val.describe(i).rpartition("_")[2]: int(source.val.labels[i]) for i in range(6)}
    assert found == {"4.JPEG": 0, "5.JPEG": 0, "2.JPEG": 1, "3.JPEG": 1, "0.JPEG": 2, "1.JPEG": 2}
    assert source.val.image(0).shape == (3, 16, 16)


def test_tiny_imagenet_broken_annotations(tmp_path: Path) -> None:
    folder = tiny_imagenet(tmp_path / "t")
    annotations = folder / "val" / "val_annotations.txt"
    good = annotations.read_text()
    annotations.write_text(good + "val_0.JPEG\tn99999999\t0\t0\t1\t1\n")
    with pytest.raises(NotFoundError, match=r"line 7: 'n99999999' is not a class"):
        load_source(str(folder))
    annotations.write_text(good + "val_99.JPEG\tn01443537\t0\t0\t1\t1\n")
    with pytest.raises(NotFoundError, match=r"line 7: 'val_99.JPEG' is not there"):
        load_source(str(folder))


def cub(folder: Path) -> Path:
    classes = [f"{i:03d}.Bird_{i}" for i in range(1, 12)]  # eleven: numbers sort as numbers
    files, labels, split = [], [], []
    image = 0
    for number, name in enumerate(classes, 1):
        write_class(folder / "images" / name, number, 3)
        for path in sorted((folder / "images" / name).iterdir()):
            image += 1
            files.append(f"{image} {name}/{path.name}")
            labels.append(f"{image} {number}")
            split.append(f"{image} {int(image % 3 != 0)}")
    (folder / "classes.txt").write_text("".join(f"{i} {c}\n" for i, c in enumerate(classes, 1)))
    for name, lines in (("images", files), ("image_class_labels", labels), ("train_test_split", split)):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.usefixtures("any_class_count")
@pytest.mark.parametrize("where", ["cub200", "CUB_200_2011", "cub200/CUB_200_2011"])
def test_cub_reads_its_lists(tmp_path: Path, where: str) -> None:
    cub(tmp_path / where)
    source = load_source("cub200", root=tmp_path, download=False)
    assert (len(source.train), len(source.val)) == (22, 11)
    assert source.train.classes[10] == "011.Bird_11"
    assert source.val.labels.tolist() == list(range(11))
    assert "011.Bird_11" in source.val.describe(10)
    assert source.val.image(10).shape == (3, 16, 16)


def test_cub_broken_lists(tmp_path: Path) -> None:
    folder = cub(tmp_path / "c")
    lists = folder / "images.txt"
    good = lists.read_text()
    lists.write_text(good + "99 a.jpg\n")
    with pytest.raises(NotFoundError, match=r"image 99 of images\.txt has no label"):
        load_source(str(folder))
    lists.write_text(good.replace("001.Bird_1/", "../001.Bird_1/", 1))
    with pytest.raises(NotFoundError, match="lies outside"):
        load_source(str(folder))
    lists.write_text(good)
    (folder / "images").rename(tmp_path / "away")
    with pytest.raises(NotFoundError, match="listed, but not there"):
        load_source(str(folder))


def domainnet(folder: Path, domain: str = "clipart") -> Path:
    for split, count in (("train", 4), ("test", 2)):
        lines = []
        for label, name in ((2, "zebra"), (0, "axe"), (1, "bee")):
            for number in range(count):
                path = f"{domain}/{name}/{split}_{number}.png"
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                digit(label, number).save(folder / path)
                lines.append(f"{path} {label}")
        (folder / f"{domain}_{split}.txt").write_text("\n".join(lines))
    return folder


@pytest.mark.usefixtures("any_class_count")
def test_domainnet_reads_its_lists(tmp_path: Path) -> None:
    domainnet(tmp_path / "domainnet")
    domainnet(tmp_path / "domainnet", "real")
    source = load_source("domainnet-clipart", root=tmp_path, download=False)
    assert source.train.classes == ("axe", "bee", "zebra")
    assert (len(source.train), len(source.val)) == (12, 6)
    assert source.train.labels[0] == 2
    assert "clipart/zebra" in source.train.describe(0)


@pytest.mark.usefixtures("any_class_count")
def test_domainnet_broken_lists(tmp_path: Path) -> None:
    folder = domainnet(tmp_path / "domainnet")
    lists = folder / "clipart_train.txt"
    lists.write_text(lists.read_text() + "\nclipart/bee/train_0.png 2")
    with pytest.raises(NotFoundError, match="line 13: label 2 is both 'zebra' and 'bee'"):
        load_source("domainnet-clipart", root=tmp_path, download=False)
    lists.write_text("nonsense")
    with pytest.raises(NotFoundError, match="line 1: 'nonsense' is not"):
        load_source("domainnet-clipart", root=tmp_path, download=False)


@pytest.mark.usefixtures("any_class_count")
@pytest.mark.parametrize("where", ["caltech256", "256_ObjectCategories", "caltech256/256_ObjectCategories"])
def test_caltech_clutter_is_no_class(tmp_path: Path, where: str) -> None:
    write_tree(tmp_path / where, ["001.ak47", "002.american-flag", "257.clutter"], val=0)
    source = load_source("caltech256", root=tmp_path, download=False)
    assert source.train.classes == ("001.ak47", "002.american-flag")
    assert len(source.train) + len(source.val) == 12


def test_imagenet_parts_are_the_published_ones() -> None:
    renditions, adversarial = set(SUBSETS["imagenet-r"]), set(SUBSETS["imagenet-a"])
    assert len(WNIDS) == 1000
    assert list(WNIDS) == sorted(set(WNIDS))
    assert (len(renditions), len(adversarial), len(renditions & adversarial)) == (200, 200, 86)


def test_imagenet_ids_are_in_the_order_of_torchvisions_names() -> None:
    from torchvision.models import ResNet18_Weights

    names = ResNet18_Weights.DEFAULT.meta["categories"]
    known = {"n01440764": "tench", "n02123045": "tabby", "n02504458": "African elephant", "n15075141": "toilet tissue"}
    assert {wnid: names[WNIDS.index(wnid)] for wnid in known} == known


def test_imagenet_r_maps_its_classes_and_refuses_others(tmp_path: Path) -> None:
    classes = list(SUBSETS["imagenet-r"])
    write_tree(tmp_path / "imagenet-r", classes, train=2, val=0)
    source = load_source("imagenet-r", root=tmp_path, download=False)
    assert list(source.train.classes) == sorted(classes)
    stranger = next(w for w in WNIDS if w not in classes)
    (tmp_path / "imagenet-r" / classes[0]).rename(tmp_path / "imagenet-r" / stranger)
    with pytest.raises(NotFoundError, match=f"{stranger} is not a class of imagenet-r"):
        load_source("imagenet-r", root=tmp_path, download=False)
