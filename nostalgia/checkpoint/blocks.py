"""Blocks of vectors (m, P) between the ranks that hold them and files that rank 0 writes and reads; collectives."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from nostalgia.checkpoint.files import BlockFile, write_block
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.parallel import tensors


def save_block(path: Path, block: Tensor, space: VectorSpace) -> str:
    """Write a block (m, P_local) whole, row by row; returns the file's checksum, empty on ranks other than 0."""
    rows = tensors.rows_to_main(block, space)
    if tensors.is_main():
        return write_block(path, rows, (block.shape[0], space.size), block.dtype)
    for _ in rows:
        pass
    return ""


def load_block(path: Path, space: VectorSpace) -> Tensor:
    """A block (m, P_local) in the dtype it was saved in; raises NotFoundError, on rank 0, where it does not fit."""
    block = BlockFile(path, space.size) if tensors.is_main() else None
    count, dtype = tensors.broadcast_object(None if block is None else (block.count, str(block.dtype)))
    rows = None if block is None else iter(block)
    return tensors.rows_from_main(rows, count, getattr(torch, dtype.removeprefix("torch.")), space)
