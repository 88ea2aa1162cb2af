"""Which columns of a `datasets` table are the images and the labels, and what the labels are called."""

from __future__ import annotations

from typing import Any

from nostalgia.data.catalog import Hub
from nostalgia.errors import NotFoundError, UsageError

LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")


def choose_columns(rows: Any, hub: Hub, where: str) -> tuple[str, str]:
    """The image and the label column: as configured, or the only ones that can be meant (of labels the first of
    `LABEL_COLUMNS`). Raises UsageError."""
    features = rows.features
    for kind, wanted in (("image", hub.image), ("label", hub.label)):
        if wanted is not None and wanted not in features:
            raise UsageError(
                f"{where}: no column {wanted!r}; it has {', '.join(features)}: set {kind}_column in dataset.entries.<name>"
            )
    images = [hub.image] if hub.image else _image_columns(features)
    labels = [hub.label] if hub.label else _label_columns(features)
    for kind, found in (("image", images), ("label", labels)):
        if len(found) != 1:
            what = f"no {kind} column"
            if found:
                what = f"{len(found)} columns could be the {kind}s ({', '.join(found)})"
            raise UsageError(
                f"{where}: {what} among {', '.join(features)}; set {kind}_column beside path or hub_id in "
                "dataset.entries.<name>"
            )
    if not (_is_image(features[images[0]]) or _is_bytes(features[images[0]])):
        raise UsageError(f"{where}: column {images[0]!r} holds no images ({features[images[0]]})")
    return images[0], labels[0]


def label_names(rows: Any, column: str, where: str) -> list[str]:
    """The class name of every row, without decoding an image. Raises NotFoundError for what is no class."""
    names = getattr(rows.features[column], "names", None)
    values = rows.select_columns([column]).with_format(None)[:][column]
    for row, value in enumerate(values):
        if isinstance(value, int) and value < 0 and (names is None or value == -1):
            raise NotFoundError(
                f"{where}, row {row}: label {value} in column {column!r}: a split without labels; choose another by val_split "
                "(or train_split) beside hub_id in dataset.entries.<name>; train_split alone holds a part of it out"
            )
        if names is not None and value is not None and not 0 <= value < len(names):
            raise NotFoundError(
                f"{where}, row {row}: label {value} in column {column!r} is out of range; "
                f"allowed is 0 to {len(names) - 1}"
            )
        if not isinstance(value, (int, str)):
            raise NotFoundError(f"{where}, row {row}: label {value!r} in column {column!r} is not a class")
    return [names[value] if names is not None else str(value) for value in values]


def class_order(feature: Any, present: list[str]) -> tuple[str, ...]:
    """Classes that occur: in the repository's order where it has one, numbers as numbers, else by name."""
    found = set(present)
    names = getattr(feature, "names", None)
    if names is not None:
        return tuple(name for name in names if name in found)
    try:
        return tuple(sorted(found, key=int))
    except ValueError:
        return tuple(sorted(found))


def _is_image(feature: Any) -> bool:
    import datasets

    # Parquet files without the hub's metadata show an image as what it is stored as.
    stored = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    return stored or isinstance(feature, datasets.Image)


def _is_bytes(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _image_columns(features: Any) -> list[str]:
    """Those of images; where there are none, of files' bytes, as a table made by pandas has them."""
    images = [name for name, feature in features.items() if _is_image(feature)]
    return images or [name for name, feature in features.items() if _is_bytes(feature)]


def _label_columns(features: Any) -> list[str]:
    import datasets

    named = [name for name in LABEL_COLUMNS if name in features]
    if named:
        return named[:1]
    return [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
