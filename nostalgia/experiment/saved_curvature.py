"""Vectors and Kronecker factors of finished tasks, in safetensors files beside the run's checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from nostalgia.checkpoint.blocks import load_block, save_block
from nostalgia.checkpoint.codec import SavedFile
from nostalgia.checkpoint.files import checksum
from nostalgia.curvature.kronecker import KroneckerFactors, LayerFactors
from nostalgia.data.tasks import Task
from nostalgia.experiment.components import Components
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.parallel import tensors
from nostalgia.utils.files import write_atomic

META = "nostalgia"


class SavedBlocks(MutableMapping[str, Tensor]):
    """Vectors (m, P_local) of finished tasks by the tasks' names, read from ``curvature/task<i><suffix>`` when asked for.

    Collective: all ranks ask alike. Nothing is kept: a task's eigenvectors have the size of k networks.
    """

    def __init__(self, run: Components, folder: Path, space: VectorSpace, suffix: str = ".safetensors") -> None:
        self.folder, self.space, self.suffix = folder, space, suffix
        self.numbers = {task.name: task.index for task in run.tasks}
        self.files: dict[str, SavedFile] = {}

    def path(self, task: str) -> Path:
        return self.folder / self._name(task)

    def __setitem__(self, task: str, block: Tensor) -> None:
        self.files[task] = SavedFile(self._name(task), save_block(self.path(task), block, self.space))

    def __getitem__(self, task: str) -> Tensor:
        return load_block(self.folder / self.files[task].name, self.space).to(self.space.dtype)

    def __delitem__(self, task: str) -> None:
        del self.files[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def _name(self, task: str) -> str:
        return f"curvature/task{self.numbers[task]}{self.suffix}"


class SavedFactors(Mapping[str, KroneckerFactors]):
    """Factors of finished tasks by name, read from ``curvature/task<i>_factors.safetensors`` when asked for.

    The file holds ``inputs/<layer>`` (i, i), ``outputs/<layer>`` (o, o), ``diagonal/<parameter>`` and, of adapters,
    ``values/<parameter>`` at the end of the task; its metadata the layers' parameters and scalings, and the temperature, as
    JSON. All ranks ask together; rank 0 alone writes and reads.
    """

    def __init__(self, folder: Path, space: VectorSpace, suffix: str = "_factors.safetensors") -> None:
        self.folder, self.space, self.suffix = folder, space, suffix
        self.files: dict[str, SavedFile] = {}

    def save(self, task: Task, factors: KroneckerFactors) -> None:
        name, digest = f"curvature/task{task.index}{self.suffix}", ""
        if tensors.is_main():
            write_atomic(self.folder / name, _encoded(factors))
            digest = checksum(self.folder / name)
        self.files[task.name] = SavedFile(name, digest)

    def __getitem__(self, task: str) -> KroneckerFactors:
        file = self.folder / self.files[task].name
        head, found = _read(file) if tensors.is_main() else (None, {})
        head, shapes = tensors.broadcast_object((head, {name: (t.shape, t.dtype) for name, t in found.items()}))
        space, whole = self.space, {}
        for name, (shape, dtype) in shapes.items():
            value = found[name].to(space.device) if found else space.zeros().new_empty(shape, dtype=dtype)
            if tensors.world_size() > 1:
                dist.broadcast(value, 0)
            whole[name] = value
        layers = tuple(
            LayerFactors(**layer, inputs=whole[f"inputs/{layer['name']}"], outputs=whole[f"outputs/{layer['name']}"])
            for layer in ({**item, "parameters": tuple(item["parameters"])} for item in head["layers"])
        )
        return KroneckerFactors(
            layers,
            _under("diagonal/", whole),
            _under("values/", whole),
            space,
            int(head["num_samples"]),
            temperature=head["temperature"],
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def _encoded(factors: KroneckerFactors) -> bytes:
    found = {f"diagonal/{name}": t for name, t in factors.diagonal.items()}
    found.update({f"values/{name}": t for name, t in factors.values.items()})
    for layer in factors.layers:
        found[f"inputs/{layer.name}"], found[f"outputs/{layer.name}"] = layer.inputs, layer.outputs
    layers = [
        {"name": layer.name, "parameters": layer.parameters, "scaling": layer.scaling} for layer in factors.layers
    ]
    meta = json.dumps({"layers": layers, "num_samples": factors.num_samples, "temperature": factors.temperature})
    return to_bytes({name: t.detach().cpu().contiguous() for name, t in found.items()}, {META: meta})


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()[META]), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def _under(prefix: str, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in whole.items() if name.startswith(prefix)}
