"""The files of a checkpoint: tensors as safetensors, everything else as JSON, sizes and checksums of all in a manifest.

Nothing here can run code: no pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from nostalgia.errors import NotFoundError
from nostalgia.utils.files import sync_folder

MANIFEST = "manifest.json"
BASIS = "basis"
FORMAT = 1
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_PIECE = 1 << 24


class Writer:
    """Writes the files of one checkpoint into ``folder``, synced to the disk, keeping their sizes and checksums."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, dict[str, Any]] = {}

    def json(self, name: str, value: Any) -> None:
        self._write(name, [json.dumps(value, allow_nan=False).encode()])

    def tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """A safetensors file of CPU tensors."""
        self._write(name, [tensors_to_bytes(dict(tensors))])

    def finish(self, kind: Mapping[str, Any], references: Mapping[str, str]) -> None:
        """Write the manifest; ``references`` maps files beside the checkpoints (relative paths) to their checksums."""
        content = {"format": FORMAT, **kind, "files": self.entries, "references": dict(references)}
        text = json.dumps({**content, "checksum": _digest_of(content)}, indent=1)
        self._write(MANIFEST, [text.encode()])
        sync_folder(self.folder)

    def _write(self, name: str, pieces: Iterable[bytes]) -> None:
        size, digest = _write_synced(self.folder / name, pieces)
        self.entries[name] = {"bytes": size, "sha256": digest}


def write_block(path: Path, rows: Iterable[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> str:
    """Write a block (m, P) as the tensor ``basis`` of a safetensors file, whole or not at all; returns its checksum.

    Row by row: it is never whole in memory. Raises OSError where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        _, digest = _write_synced(temporary, _block_pieces(rows, shape, dtype))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return digest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; raises NotFoundError where it is missing or damaged."""
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise NotFoundError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise NotFoundError(f"{file}: damaged, not JSON") from None
    if not isinstance(content, dict) or content.pop("checksum", None) != _digest_of(content):
        raise NotFoundError(f"{file}: damaged, its checksum does not fit")
    if content.get("format") != FORMAT:
        raise NotFoundError(f"{file}: format {content.get('format')!r}, this version reads {FORMAT}")
    files, references = content.get("files"), content.get("references")
    if not isinstance(files, dict) or not isinstance(references, dict):
        raise NotFoundError(f"{file}: lists no files")
    return content


def verify(folder: Path, manifest: Mapping[str, Any], root: Path) -> None:
    """Compare all files with the manifest; raises NotFoundError naming the first that is missing or changed."""
    for name, entry in manifest["files"].items():
        if name == MANIFEST:
            continue
        if Path(name).name != name or not isinstance(entry, dict):
            raise NotFoundError(f"{folder / MANIFEST}: {name!r} is not the name of a file of this checkpoint")
        path = folder / name
        if path.is_file() and path.stat().st_size != entry.get("bytes"):
            raise NotFoundError(f"{path}: damaged, {path.stat().st_size} bytes of {entry.get('bytes')}")
        if checksum(path) != entry.get("sha256"):
            raise NotFoundError(f"{path}: damaged, its checksum does not fit")
    for name, expected in manifest["references"].items():
        path = root / name
        if not path.resolve().is_relative_to(root.resolve()):
            raise NotFoundError(f"{folder / MANIFEST}: refers to {name!r}, outside the run's folder")
        if checksum(path) != expected:
            raise NotFoundError(f"{path}: damaged, its checksum does not fit")


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; raises NotFoundError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError as error:
        raise NotFoundError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_tensors(path.read_bytes())
    except (OSError, SafetensorError, ValueError) as error:
        raise NotFoundError(f"{path}: not a whole safetensors file ({error})") from None


def read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise NotFoundError(f"{path}: not a whole JSON file ({error})") from None
    if not isinstance(value, dict):
        raise NotFoundError(f"{path}: not a JSON object")
    return value


class BlockFile:
    """A block (m, ``width``) that `write_block` wrote, read row by row.

    Raises NotFoundError where it is none, and for a value that is not finite.
    """

    def __init__(self, path: Path, width: int) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            self._slice = self._file.get_slice(BASIS)
            shape = tuple(self._slice.get_shape())
            self.dtype = {name: dtype for dtype, name in _NAMES.items()}[self._slice.get_dtype()]
        except (OSError, KeyError, SafetensorError) as error:
            raise NotFoundError(f"{path}: cannot be read as a block of vectors ({error})") from None
        if len(shape) != 2 or shape[1] != width:
            raise NotFoundError(f"{path}: a block of shape {shape}; expected are rows of {width} numbers")
        self.count = shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(self.count):
            row = self._slice[i : i + 1][0]
            if not bool(torch.isfinite(row).all()):
                raise NotFoundError(f"{self.path}: row {i + 1} holds values that are not finite")
            yield row


def _block_pieces(rows: Iterable[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Iterator[bytes]:
    """The format is a length, a JSON header and the numbers: https://github.com/huggingface/safetensors."""
    size = shape[0] * shape[1] * torch.empty((), dtype=dtype).element_size()
    entry = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [0, size]}
    header = json.dumps({BASIS: entry}).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for row in rows:
        yield row.contiguous().view(torch.uint8).numpy().tobytes()


def _write_synced(path: Path, pieces: Iterable[bytes]) -> tuple[int, str]:
    """Write and sync to the disk; returns size and checksum."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
