"""Class folders of images, scanned in a fixed order."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from nostalgia.data.images import FileImages
from nostalgia.errors import NotFoundError

SPLITS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev", "test", "testing", "eval"),
}
ALL_SPLITS = {name for names in SPLITS.values() for name in names}
#: Endings of image files that are read: torchvision's, and others that Pillow decodes (of a gif the first frame).
ENDINGS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",  # torchvision's
    ".gif", ".jfif", ".jpe", ".avif",
)  # fmt: skip

Identity = tuple[int, int]  # (device, inode) of a folder


def class_folders(name: str, folder: Path, drop: Sequence[str] = ()) -> tuple[FileImages, FileImages | None]:
    """``folder/{train,val|valid|test}/<class>/*``, or ``folder/<class>/*``, whose second part is None.

    Split folders are known in any case; one folder around all of it is seen through. Raises NotFoundError: nothing there, a
    class without images, two that differ only in case or in their Unicode form, a single class, a link loop.
    """
    folder = _unwrapped(folder)
    train, val = (_split_folder(folder, names) for names in SPLITS.values())
    if train is not None and val is None and not _folders(train) and len(_folders(folder)) > 1:
        train = None  # "train" is a class here, beside "plane"
    if train is None:
        if val is not None and _folders(val):
            raise NotFoundError(
                f"{folder}: {val.name}/ but no train/ beside it; to hold a part of {val.name}/ out for "
                "validation, give its own path"
            )
        return scan(name, folder, drop), None
    found = scan(name, train, drop)
    used = {train.name, "" if val is None else val.name}
    others = [other for other in _folders(folder) if other.lower() in ALL_SPLITS and other not in used]
    if others:
        found.notes += (f"left out of {folder}: the split folder{'s' * (len(others) > 1)} {', '.join(others)}",)
    return found, None if val is None else scan(name, val, drop)


def scan(name: str, folder: Path, drop: Sequence[str] = ()) -> FileImages:
    """``folder/<class>/*``: classes by name, images anywhere below them, hidden names ignored."""
    above = {_identity(folder): str(folder)}
    entries = list(_entries(folder))
    classes = in_order([entry.name for entry in entries if _is_folder(entry) and entry.name not in drop])
    if not classes:
        loose = sum(_is_image(entry) for entry in entries)
        what = f"{loose} images but no class folders" if loose else "empty"
        raise NotFoundError(f"{folder}: {what}; expected {folder}/<class>/*.png, or another image format")
    _check_case(folder, classes)
    paths: list[str] = []
    labels: list[int] = []
    left = LeftOut(folder)
    left.look_at(folder, loose=True)
    for label, class_name in enumerate(classes):
        found = list(_images_below(os.path.join(folder, class_name), above, set(), left))
        if not found:
            raise NotFoundError(f"{folder / class_name}: class folder without an image ({', '.join(ENDINGS[:4])}, ...)")
        paths += found
        labels += [label] * len(found)
    images = FileImages(name, paths, labels, [unicodedata.normalize("NFC", c) for c in classes])
    images.notes = left.notes()
    return images


class LeftOut:
    """Counts, below ``folder``, the files that are not taken as images."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kinds, self.first = folder, Counter[str](), ""

    def look_at(self, folder: Path | str, loose: bool = False) -> None:
        """Count what lies directly in a folder; ``loose``: images too, which are of no class there."""
        for entry in _entries(folder, hidden=True):
            kind = ""
            if _is_hidden(entry.name):
                kind = "hidden"
            elif not _is_folder(entry) and (loose or not _is_image(entry)):
                kind = Path(entry.name).suffix.lower() or "without an ending"
            if kind:
                self.first = self.first or os.path.relpath(entry.path, self.folder)
                self.kinds[kind] += 1

    def notes(self) -> tuple[str, ...]:
        if not self.kinds:
            return ()
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        return (
            f"left out of {self.folder}: {self.kinds.total()} files that are no images of a class ({kinds}; the first is "
            f"{self.first})",
        )


def in_order(classes: Sequence[str]) -> list[str]:
    """Class names in order: by number where all are numbers (0, 1, 2, 10), as a table's labels are, else by name."""
    if all(name.isascii() and name.isdecimal() for name in classes):
        return sorted(classes, key=lambda name: (int(name), name))
    return sorted(classes)


def _unwrapped(folder: Path) -> Path:
    """``folder``, or what it wraps: the one folder in it, without images beside, that holds splits or several classes."""
    while True:
        inside = list(_entries(folder))
        inner = [entry for entry in inside if _is_folder(entry)]
        if len(inner) != 1 or any(_is_image(entry) for entry in inside):
            return folder
        below = _folders(folder / inner[0].name)
        if inner[0].name.lower() in ALL_SPLITS or not below:
            return folder
        folder = folder / inner[0].name


def is_empty(folder: Path) -> bool:
    """Whether nothing lies there but hidden files."""
    return next(_entries(folder), None) is None


def images_by_name(folder: Path) -> dict[str, str]:
    """The images directly in ``folder``: name -> path."""
    return {entry.name: entry.path for entry in _entries(folder) if _is_image(entry)}


def _check_case(folder: Path, classes: Sequence[str]) -> None:
    folded: dict[str, str] = {}
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(name).decode(errors="backslashreplace")
            raise NotFoundError(
                f"{folder}: the class folder '{shown}' has a name that is not UTF-8; rename it"
            ) from None
        composed = unicodedata.normalize("NFC", name)
        twin = folded.get("NFC " + composed)
        if twin is not None and twin != name:
            raise NotFoundError(
                f"{folder}: two class folders are called {composed!r}, one in composed and one in decomposed Unicode; merge "
                "or rename one"
            )
        folded["NFC " + composed] = name
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            raise NotFoundError(
                f"{folder}: class folders {other!r} and {name!r} differ only in case; merge or rename one"
            )


def _images_below(folder: str, above: dict[Identity, str], seen: set[Identity], left: LeftOut) -> Iterator[str]:
    """Images in ``folder`` and below. One reached twice is read once; one that leads back up is a loop."""
    identity = _identity(folder)
    if identity in above:
        raise NotFoundError(f"{folder}: a symbolic link back to {above[identity]}: a loop; remove it")
    if identity in seen:
        return
    seen.add(identity)
    left.look_at(folder)
    for entry in _entries(folder):
        if _is_folder(entry):
            yield from _images_below(entry.path, {**above, identity: folder}, seen, left)
        elif _is_image(entry):
            if entry.is_symlink() and not os.path.exists(entry.path):  # found when it is read, hours later
                raise NotFoundError(
                    f"{entry.path}: a symbolic link to {os.readlink(entry.path)}, which is not there; remove it"
                )
            yield entry.path


def _entries(folder: Path | str, hidden: bool = False) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise NotFoundError(f"{folder}: cannot be read ({error.strerror})") from None
    return (entry for entry in entries if hidden or not _is_hidden(entry.name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"  # which zip on a Mac puts beside what it packs


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in _entries(folder) if _is_folder(entry)]


def _split_folder(folder: Path, names: Sequence[str]) -> Path | None:
    by_name = {entry.name.lower(): entry.name for entry in _entries(folder) if _is_folder(entry)}
    return next((folder / by_name[name] for name in names if name in by_name), None)


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(ENDINGS)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself
        raise NotFoundError(f"{entry.path}: cannot be followed ({error.strerror}): remove the link") from None


def _identity(folder: Path | str) -> Identity:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise NotFoundError(f"{folder}: cannot be read ({error.strerror})") from None
    if not stat.S_ISDIR(status.st_mode):
        raise NotFoundError(f"{folder}: not a folder")
    return status.st_dev, status.st_ino
