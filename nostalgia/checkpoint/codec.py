"""State of any component as JSON, tensors and files, and back: one codec for everything that a checkpoint holds.

State is nested dicts (string keys) and lists of plain values, tensors (the same on all ranks, or DTensors), `Block` s
(vectors spread over ranks, each in a file of its own) and `SavedFile` s. All ranks encode and decode together.
"""

from __future__ import annotations

import math
import secrets
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from nostalgia.checkpoint.blocks import load_block, save_block
from nostalgia.checkpoint.store import BLOCKS
from nostalgia.errors import RunFailedError, UsageError
from nostalgia.linalg.block import Block
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.parallel import tensors
from nostalgia.parallel.guard import differing

TENSOR, BLOCK, FILE = "<tensor>", "<block>", "<file>"


@dataclass(frozen=True)
class SavedFile:
    """A file of the run that state refers to, with its checksum ("" on ranks other than 0)."""

    name: str  # relative to the run's folder
    digest: str


@dataclass
class Encoded:
    """``plain`` is JSON, of which rank 0's is kept, and ``whole`` what is the same on all ranks: plain tensors, and blocks that
    every rank has whole, as they are written; ``values`` and ``references`` are rank 0's alone.
    """

    plain: Any
    whole: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)  # file -> checksum


@dataclass(frozen=True)
class _Written:
    rows: weakref.ref[Tensor]
    version: int
    file: SavedFile


class StateCodec:
    """Encodes into, and decodes from, the checkpoints of the run in ``run_dir``.

    A block that has not changed since it was last written (the same tensor, not written to) is not written again.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._written: dict[str, _Written] = {}

    def encode(self, state: Any, name: str, owner: str) -> Encoded:
        """``state`` under the prefix ``name``.

        Raises UsageError naming ``owner`` for what cannot be kept, and RunFailedError for tensors that are not the same on
        all ranks: a run that resumed would have rank 0's everywhere.
        """
        encoded = Encoded(None)
        encoded.plain = self._encode(state, name, owner, encoded)
        # Numbers may be a rank's own, such as the seconds it took; tensors are what the rest of the run depends on.
        shapes = tensors.gather_objects([(key, tuple(tensor.shape)) for key, tensor in encoded.whole.items()])
        odd = [rank for rank, found_there in enumerate(shapes) if found_there != shapes[0]]
        found = (name, odd) if odd else differing(encoded.whole)
        if found is not None:
            raise RunFailedError(
                f"{owner}: its state {found[0]} on rank {', '.join(map(str, found[1]))} is not rank 0's; allowed are tensors "
                "that are the same on all ranks (reduced over them), DTensors and Blocks"
            )
        return encoded

    def decode(
        self,
        plain: Any,
        values: Mapping[str, Tensor],
        references: Mapping[str, str],
        space: VectorSpace,
        device: torch.device,
    ) -> Any:
        """The state again: tensors whole on ``device`` on every rank, blocks in ``space``.

        ``plain`` is given on all ranks, ``values`` on rank 0. Raises ValueError for what refers to files not listed.
        """
        if isinstance(plain, Mapping):
            if TENSOR in plain:
                return self._tensor(plain, values, device)
            if BLOCK in plain:
                return self._block(plain[BLOCK], references, space)
            if FILE in plain:
                return SavedFile(plain[FILE], self._digest(plain[FILE], references))
            return {key: self.decode(item, values, references, space, device) for key, item in plain.items()}
        if isinstance(plain, list):
            return [self.decode(item, values, references, space, device) for item in plain]
        return plain

    def _encode(self, value: Any, name: str, owner: str, into: Encoded) -> Any:
        if isinstance(value, Tensor):
            if not isinstance(value, DTensor):
                into.whole[name] = value
            into.values.update(tensors.to_main({name: value}))
            return {TENSOR: name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if isinstance(value, Block):
            file = self._save(value, name, into)
            into.references[file.name] = file.digest
            return {BLOCK: file.name}
        if isinstance(value, SavedFile):
            into.references[value.name] = value.digest
            return {FILE: value.name}
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str) or key in (TENSOR, BLOCK, FILE):
                    raise UsageError(f"{owner}: its state {name} has the key {key!r}; allowed are strings")
            return {key: self._encode(item, f"{name}/{key}", owner, into) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._encode(item, f"{name}/{i}", owner, into) for i, item in enumerate(value)]
        if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
            return value
        raise UsageError(
            f"{owner}: its state {name} is {value!r:.60} ({type(value).__name__}); allowed are dicts, lists, strings, finite "
            "numbers, booleans, null, tensors and Blocks"
        )

    def _save(self, block: Block, name: str, into: Encoded) -> SavedFile:
        before = self._written.get(name)
        unchanged = before is not None and before.rows() is block.rows and before.version == block.rows._version
        # What no checkpoint referred to for a while has been removed; rank 0 decides for all.
        if tensors.broadcast_object(before is not None and unchanged and (self.run_dir / before.file.name).is_file()):
            assert before is not None
            return before.file
        if block.space.placement == "local":
            into.whole[name] = block.rows
        token = tensors.broadcast_object(secrets.token_hex(4))  # never the name of a file in use
        file = f"checkpoints/{BLOCKS}/{name.replace('/', '.')}_{token}.safetensors"
        saved = SavedFile(file, save_block(self.run_dir / file, block.rows, block.space))
        self._written[name] = _Written(weakref.ref(block.rows), block.rows._version, saved)
        return saved

    def _block(self, file: str, references: Mapping[str, str], space: VectorSpace) -> Block:
        self._digest(file, references)
        return Block(load_block(self.run_dir / file, space), space)

    @staticmethod
    def _digest(file: str, references: Mapping[str, str]) -> str:
        if file not in references:
            raise ValueError(f"the file {file} is not one of its own")
        return references[file]

    @staticmethod
    def _tensor(plain: Mapping[str, Any], values: Mapping[str, Tensor], device: torch.device) -> Tensor:
        dtype = getattr(torch, plain["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{plain['dtype']} is no dtype")
        if tensors.is_main():
            whole = values[plain[TENSOR]].to(device).clone()
            if list(whole.shape) != plain["shape"] or whole.dtype != dtype:
                raise ValueError(f"{plain[TENSOR]} has another shape or dtype than its description")
        else:
            whole = torch.empty(plain["shape"], dtype=dtype, device=device)
        if tensors.world_size() > 1:
            dist.broadcast(whole, 0)
        return whole


class ReadOnce(dict[str, Any]):
    """A state whose owner is to read every name of it: `unread` are the names that it passed over.

    A plain dictionary otherwise; copying it reads all.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        super().__init__(state)
        self._read: set[str] = set()

    @property
    def unread(self) -> list[str]:
        """Names with a value that nothing has asked for."""
        return [name for name, value in super().items() if value is not None and name not in self._read]

    def fresh(self) -> ReadOnce:
        """The same state, to be changed at will: containers and tensors are copies, blocks are not. Reading it counts here."""
        copied = ReadOnce({name: _fresh(value) for name, value in super().items()})
        copied._read = self._read
        return copied

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:  # dict(state) and {**state} then go by __getitem__
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        self._read.add(name)
        return super().get(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        value = self.get(name, *default) if default else self[name]
        return super().pop(name, value)

    def items(self) -> Any:
        return {name: self[name] for name in self}.items()

    def values(self) -> Any:
        return {name: self[name] for name in self}.values()

    def copy(self) -> dict[str, Any]:
        return dict(self)


def _fresh(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _fresh(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_fresh(one) for one in value)
    return value.clone() if isinstance(value, Tensor) else value
