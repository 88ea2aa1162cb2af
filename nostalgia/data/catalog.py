"""What is known of each data set by name: one entry says it all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nostalgia.errors import UsageError
from nostalgia.options import nearest

AUGMENTATIONS = ("none", "flip", "crop_flip", "shift")


@dataclass(frozen=True)
class Hub:
    """A data set repository of the Hugging Face hub, or a local folder laid out like one."""

    id: str
    config: str | None = None
    image: str | None = None  # columns; None: the one image column, the one label column
    label: str | None = None
    train: str | None = None  # splits, joined by "+"; None: "train"
    val: str | None = None  # None: validation, valid, val or test; or a part held out of the training split
    keep: tuple[str, str] | None = None  # (column, value): only these rows


@dataclass(frozen=True)
class Entry:
    """A data set by name."""

    name: str
    classes: int | None = None
    hub: tuple[Hub, ...] = ()  # in the order they are tried
    torchvision: str | None = None  # a key of torchvision_files.SETS
    folders: tuple[str, ...] = ()  # other names its folder has under ${dataset.root}
    drop: tuple[str, ...] = ()  # classes that are none
    embedded: bool = False  # comes with the installation
    idx: bool = False  # MNIST's four files, which may also lie in ${dataset.root} itself
    domain: str | None = None  # one of DomainNet's
    wnids: str | None = None  # classes are these WordNet ids: a key of imagenet.SUBSETS
    augment: str = "crop_flip"
    path: str | None = None  # a folder of the user's, instead of ${dataset.root}/<name>
    licence: str = ""
    how: str = ""  # how to get it by hand


def _domain(domain: str) -> Entry:
    return Entry(
        f"domainnet-{domain}",
        classes=345,
        hub=(Hub("wltjr1007/DomainNet", train="train", val="test", keep=("domain", domain)),),
        folders=("domainnet", "DomainNet"),
        domain=domain,
        licence="research only",
        how=f"{domain}.zip, {domain}_train.txt and {domain}_test.txt of ai.bu.edu/M3SDA into "
        "${dataset.root}/domainnet",
    )


CATALOG: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("digits", classes=10, embedded=True, augment="shift", licence="CC BY 4.0 (UCI 80)"),
        Entry(
            "mnist",
            classes=10,
            hub=(Hub("ylecun/mnist"),),
            torchvision="MNIST",
            idx=True,
            augment="shift",
            licence="MIT, as the hub's card says",
        ),
        Entry(
            "fashion_mnist",
            classes=10,
            hub=(Hub("zalando-datasets/fashion_mnist"),),
            torchvision="FashionMNIST",
            folders=("fashion-mnist",),
            idx=True,
            augment="flip",
            licence="MIT",
        ),
        Entry(
            "cifar10",
            classes=10,
            hub=(Hub("uoft-cs/cifar10", image="img", label="label"),),
            torchvision="CIFAR10",
        ),
        Entry(
            "cifar100",
            classes=100,
            hub=(Hub("uoft-cs/cifar100", image="img", label="fine_label"),),
            torchvision="CIFAR100",
        ),
        Entry(
            "tinyimagenet",
            classes=200,
            hub=(Hub("zh-plus/tiny-imagenet", train="train", val="valid"),),
            folders=("tiny-imagenet-200", "tiny-imagenet"),
            licence="ImageNet's terms: non-commercial research",
            how="unpack cs231n.stanford.edu/tiny-imagenet-200.zip under ${dataset.root}",
        ),
        Entry(
            "caltech256",
            classes=256,
            hub=(Hub("ilee0022/Caltech-256", label="text", train="train", val="test"),),
            torchvision="Caltech256",
            folders=("256_ObjectCategories",),
            drop=("257.clutter", "clutter"),
            licence="CC BY 4.0",
            how="unpack 256_ObjectCategories.tar of data.caltech.edu/records/nyy15-4j048 under "
            "${dataset.root}/caltech256",
        ),
        Entry(
            "cub200",
            classes=200,
            hub=(
                Hub("Donghyun99/CUB-200-2011", train="train", val="test"),
                Hub("bentrevett/caltech-ucsd-birds-200-2011", train="train", val="test"),
            ),
            folders=("CUB_200_2011",),
            licence="non-commercial research and education",
            how="unpack CUB_200_2011.tgz of data.caltech.edu/records/65de6-vp158 under ${dataset.root}",
        ),
        Entry(
            "flowers102",
            classes=102,
            hub=(
                Hub("dpdl-benchmark/oxford_flowers102", train="train+validation", val="test"),
                Hub("nelorth/oxford-flowers"),
            ),
            torchvision="Flowers102",
            licence="not stated",
        ),
        Entry(
            "imagenet100",
            classes=100,
            hub=(Hub("clane9/imagenet-100", train="train", val="validation"),),
            folders=("imagenet-100", "ImageNet100"),
            licence="ImageNet's terms: non-commercial research",
        ),
        Entry(
            "imagenet-r",
            classes=200,
            hub=(Hub("axiong/imagenet-r", label="wnid", train="test"),),
            folders=("imagenet_r", "imagenetr"),
            wnids="imagenet-r",
            licence="MIT",
            how="unpack people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar under ${dataset.root}",
        ),
        Entry(
            "imagenet-a",
            classes=200,
            hub=(Hub("barkermrl/imagenet-a", train="train"),),
            folders=("imagenet_a", "imageneta"),
            wnids="imagenet-a",
            licence="MIT",
            how="unpack people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar under ${dataset.root}",
        ),
        Entry(
            "imagenet1k",
            classes=1000,
            hub=(Hub("ILSVRC/imagenet-1k", train="train", val="validation"),),
            folders=("imagenet", "ILSVRC2012"),
            wnids="imagenet1k",
            licence="non-commercial research",
            how="accept the terms at huggingface.co/datasets/ILSVRC/imagenet-1k (150 GB), then hf auth login; "
            "or class folders under ${dataset.root}/train and ${dataset.root}/val",
        ),
        Entry(
            "svhn",
            classes=10,
            hub=(Hub("ufldl-stanford/svhn", config="cropped_digits", train="train", val="test"),),
            torchvision="SVHN",
            augment="shift",
            licence="non-commercial",
        ),
        Entry(
            "dtd",
            classes=47,
            hub=(Hub("tanganke/dtd", train="train", val="test"),),
            torchvision="DTD",
            licence="research only",
        ),
        Entry(
            "food101",
            classes=101,
            hub=(Hub("ethz/food101", train="train", val="validation"),),
            torchvision="Food101",
            licence="research; see the data set's card",
        ),
        Entry(
            "eurosat",
            classes=10,
            hub=(Hub("blanchon/EuroSAT_RGB", train="train", val="test"),),
            torchvision="EuroSAT",
            licence="MIT",
        ),
        *(_domain(d) for d in ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")),
    )
}

_HUB_KEYS = {
    "hub_config": "config",
    "image_column": "image",
    "label_column": "label",
    "train_split": "train",
    "val_split": "val",
}
ENTRY_KEYS = ("path", "hub_id", *_HUB_KEYS, "classes", "augment")


def find(name: str, entries: Mapping[str, Any]) -> Entry | None:
    """The entry of a name, the user's own ``dataset.entries`` first. UsageError for a malformed one."""
    known = CATALOG.get(name)
    return known if name not in entries else _user_entry(name, known or Entry(name), entries[name])


def unknown(name: str, entries: Mapping[str, Any]) -> UsageError:
    """The error for a name that is neither in the catalog nor a folder, with the nearest known name."""
    names = [*entries, *CATALOG]
    return UsageError(
        f"unknown dataset {name!r}{nearest(name.lower(), names)}; it is no existing folder either. Known are "
        f"{', '.join(sorted(names))}, hf:user/name, a folder of images, or dataset.entries.<name>"
    )


def _user_entry(name: str, base: Entry, given: Any) -> Entry:
    where = f"dataset.entries.{name}"
    if not isinstance(given, Mapping):
        raise UsageError(f"{where}={given!r}: expected keys, of {', '.join(ENTRY_KEYS)}")
    for key, value in given.items():
        if key not in ENTRY_KEYS:
            hint = nearest(str(key), ENTRY_KEYS)
            raise UsageError(f"{where}: unknown key {key!r}{hint}; allowed are {', '.join(ENTRY_KEYS)}")
        if key == "classes":
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{where}.classes={value!r}: allowed is a positive number")
        elif not isinstance(value, str) or not value:
            raise UsageError(f"{where}.{key}={value!r}: allowed is a text")
    if given.get("augment", "none") not in AUGMENTATIONS:
        raise UsageError(f"{where}.augment={given['augment']!r}: allowed are {', '.join(AUGMENTATIONS)}")
    hub_values = {ours: given[key] for key, ours in _HUB_KEYS.items() if key in given}
    if hub_values and not {"hub_id", "path"} & set(given):
        raise UsageError(f"{where}: {', '.join(k for k in _HUB_KEYS if k in given)} need path or hub_id beside them")
    changes: dict[str, Any] = {key: given[key] for key in ("path", "classes", "augment") if key in given}
    if "hub_id" in given:
        # A repository of the user's own shares nothing with the catalog's data set but the name.
        base = Entry(name, augment=base.augment, hub=(Hub(given["hub_id"], **hub_values),))
    elif hub_values:
        base = replace(base, hub=(replace(base.hub[0] if base.hub else Hub(given["path"]), **hub_values),))
    return replace(base, **changes)
