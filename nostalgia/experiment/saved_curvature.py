"""Eigenvectors and Kronecker factors of finished tasks, in safetensors files beside the run's checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
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
from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.parallel import tensors
from nostalgia.reporting.files import write_atomic

META = "nostalgia"


class SavedBases(Mapping[str, Tensor]):
    """Eigenvectors (k, P_local) of finished tasks by name, read from their files when asked for.

    Collective: all ranks ask alike. Nothing is kept: a task's basis has the size of k networks.
    """

    def __init__(self, run: Components, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.files: dict[str, SavedFile] = {}

    def save(self, task: Task, pairs: Eigenpairs) -> Path:
        name = f"curvature/task{task.index}.safetensors"
        self.files[task.name] = SavedFile(name, save_block(self.folder / name, pairs.eigenvectors, pairs.space))
        return self.folder / name

    def __getitem__(self, name: str) -> Tensor:
        return load_block(self.folder / self.files[name].name, self.run.space).to(self.run.space.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


class SavedFactors(Mapping[str, KroneckerFactors]):
    """Factors of finished tasks by name, read from ``curvature/task<i>_factors.safetensors`` when asked for.

    The file holds ``inputs/<layer>`` (i, i), ``outputs/<layer>`` (o, o), ``diagonal/<parameter>`` and, of adapters,
    ``values/<parameter>`` at the end of the task; its metadata the layers' parameters and scalings as JSON. All ranks ask
    together; rank 0 alone writes and reads.
    """

    def __init__(self, run: Components, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.files: dict[str, SavedFile] = {}

    def save(self, task: Task, factors: KroneckerFactors) -> None:
        name, digest = f"curvature/task{task.index}_factors.safetensors", ""
        if self.run.accelerator.is_main_process:
            write_atomic(self.folder / name, _encoded(factors))
            digest = checksum(self.folder / name)
        self.files[task.name] = SavedFile(name, digest)

    def __getitem__(self, task: str) -> KroneckerFactors:
        file = self.folder / self.files[task].name
        head, found = _read(file) if tensors.is_main() else (None, {})
        head, shapes = tensors.broadcast_object((head, {name: (t.shape, t.dtype) for name, t in found.items()}))
        space = self.run.space
        whole = {}
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
            layers, _under("diagonal/", whole), _under("values/", whole), space, int(head["num_samples"])
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
    meta = json.dumps({"layers": layers, "num_samples": factors.num_samples})
    return to_bytes({name: t.detach().cpu().contiguous() for name, t in found.items()}, {META: meta})


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()[META]), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def _under(prefix: str, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in whole.items() if name.startswith(prefix)}
