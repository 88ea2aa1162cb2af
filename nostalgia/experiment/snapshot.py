"""What a checkpoint of a run holds, and taking a run up from it."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from nostalgia.checkpoint.blocks import load_block, save_block
from nostalgia.checkpoint.store import BLOCKS, EIGENSOLVE, Contents, understood
from nostalgia.errors import NotFoundError
from nostalgia.experiment.curvature_phase import CurvaturePhase
from nostalgia.experiment.heads import empty_heads
from nostalgia.experiment.resume import Resumed
from nostalgia.experiment.setup import Parts, versions
from nostalgia.experiment.state import RunState
from nostalgia.linalg.krylov import LanczosState
from nostalgia.models import norm_statistics
from nostalgia.parallel import tensors
from nostalgia.parallel.accelerator import strategy
from nostalgia.parallel.modules import inner_module, named_parameters
from nostalgia.parallel.random_state import capture_random_state, restore_random_state
from nostalgia.training.loop import PhaseState, Training
from nostalgia.training.task_model import TaskModel

_SOLVE_VECTORS = ("basis", "parked")


class Snapshot:
    """Takes a run's parts apart into files' contents, and puts them together again.

    Of the backbone only what training changes is kept: the rest is built anew from the same weights, which
    ``initial``'s checksum makes sure of.
    """

    def __init__(self, parts: Parts, curvature: CurvaturePhase, initial: Mapping[str, Tensor]) -> None:
        self.parts, self.curvature = parts, curvature
        self.trained = [name for name, p in parts.backbone.named_parameters() if p.requires_grad]
        self.initial = _fingerprint(initial) if tensors.is_main() else ""
        self.fixed = {
            "tasks": [[t.name, t.classes] for t in parts.tasks],
            "initial": self.initial,
            "global_batch": self._global_batch(),
            "strategy": strategy(parts.accelerator),
            "versions": versions(),
            "config": OmegaConf.to_container(OmegaConf.structured(parts.config), resolve=True),
        }

    def take(self, kind: str, state: RunState, training: Training | None, log: dict[str, int]) -> Contents:
        """The contents of a checkpoint at this moment; a collective, empty of tensors on ranks other than 0."""
        parts = self.parts
        backbone: nn.Module = parts.backbone
        if training is not None and state.stage != "baseline":  # which trains a head on a copy
            backbone = cast(TaskModel, inner_module(training.wrapped)).backbone
        values = tensors.to_main(self._trained(backbone))
        phase = None if training is None else training.capture()
        # Between phases they are those the last task ended with, whichever an evaluation under way has put in.
        between = training is None and len(parts.norm_statistics) > 0
        own = parts.norm_statistics[-1] if between else norm_statistics.capture(backbone)
        ranks = tensors.gather_objects({**capture_random_state(parts.view.device), "norm": own})
        solve, references = self._take_solve(values)
        label = f"task{state.round}_{state.stage}" if kind != "end_of_task" else f"task{state.round - 1}_{kind}"
        if not tensors.is_main():
            return Contents(label, kind, {}, {})
        values.update(
            {f"heads/{i}/{k}": v.cpu().clone() for i, h in enumerate(parts.heads) for k, v in h.state_dict().items()}
        )
        values.update({f"norm/{i}/{k}": v for i, s in enumerate(parts.norm_statistics) for k, v in s.items()})
        values.update({f"phase/{k}": v for k, v in phase.tensors.items()} if phase is not None else {})
        rest = [_split_tensors(rank, f"ranks/{i}", values) for i, rank in enumerate(ranks)]
        content = {
            "run": state.to_json(),
            "phase": None if phase is None else phase.position,
            "solve": solve,
            "heads": len(parts.heads),
            "curvature": self.curvature.state(),
            "log": log,
            "ranks": rest,
            **self.fixed,
        }
        # A tensor may stand under two names (the statistics of jointly trained tasks); in a file it is its own.
        values = {name: value.contiguous().clone() for name, value in values.items()}
        return Contents(label, kind, content, values, {**self.curvature.references, **references})

    def restore(self, resumed: Resumed) -> RunState:
        """Put ``resumed`` into the run's parts; a collective. The phase in progress is left to its owner.

        Raises NotFoundError for a checkpoint that is whole but not one of this run, or of no run.
        """
        with understood(resumed.source):
            return self._restore(resumed)

    def _restore(self, resumed: Resumed) -> RunState:
        parts, saved = self.parts, resumed.state
        assert saved is not None
        self._check_same_run(saved, resumed.source)
        values, source = resumed.values, resumed.source
        tensors.from_main(self._trained(parts.backbone), values, source)
        ranks = tensors.broadcast_object([_join_tensors(r, f"ranks/{i}", values) for i, r in enumerate(saved["ranks"])])
        rank, count = parts.accelerator.process_index, len(ranks)
        norm_statistics.apply(parts.backbone, ranks[rank % count]["norm"])
        resumed.random_state = ranks[rank] if rank < count else None
        own = norm_statistics.capture(parts.backbone)
        parts.heads.extend(empty_heads(parts, saved["heads"]))
        for i, head in enumerate(parts.heads):
            statistics = {key: value.clone() for key, value in own.items()}
            targets = {f"heads/{i}/{key}": value for key, value in head.state_dict().items()}
            targets.update({f"norm/{i}/{key}": value for key, value in statistics.items()})
            tensors.from_main(targets, values, source)
            parts.norm_statistics.append(statistics)
        references = {name: digest for name, digest in resumed.references.items() if EIGENSOLVE not in name}
        self.curvature.restore(saved["curvature"], references)
        if saved["phase"] is not None:
            resumed.phase = PhaseState(saved["phase"], _below("phase", values))
        if saved["solve"] is not None:
            if saved["solve"]["file"] not in resumed.references:
                raise ValueError("an eigensolve's file that is not one of its own")
            resumed.solve = self._restore_solve(saved["solve"], values, resumed.run_dir)
        return RunState.from_json(saved["run"])

    def restore_random_state(self, resumed: Resumed) -> None:
        if resumed.random_state is not None:
            restore_random_state(resumed.random_state, self.parts.view.device)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _trained(self, backbone: nn.Module) -> dict[str, Tensor]:
        parameters = named_parameters(backbone)
        return {f"backbone/{name}": parameters[name].detach() for name in self.trained}

    def _global_batch(self) -> int:
        config = self.parts.config
        per_device = config.dataset.batch_size * config.train.gradient_accumulation_steps
        return per_device * self.parts.accelerator.num_processes

    def _take_solve(self, values: dict[str, Tensor]) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """An eigensolve in progress: its vectors into a file of their own, what is small into ``values``."""
        if self.curvature.solve is None:
            return None, {}
        solve, space = self.curvature.solve.clone(), self.parts.space
        name = f"checkpoints/{BLOCKS}/{EIGENSOLVE}{secrets.token_hex(4)}.safetensors"  # never one in use
        digest = save_block(self.curvature.folder / name, torch.cat([solve.basis, solve.parked]), space)
        rest = {key: value for key, value in vars(solve).items() if key not in _SOLVE_VECTORS}
        small: dict[str, Tensor] = {}
        plain = _split_tensors(rest, "solve", small)
        if tensors.is_main():
            values.update(small)
        return {"file": name, "basis": len(solve.basis), **plain}, {name: digest}

    def _restore_solve(self, saved: dict[str, Any], values: Mapping[str, Tensor], run_dir: Path) -> LanczosState:
        block = load_block(run_dir / saved.pop("file"), self.parts.space)
        rows = saved.pop("basis")
        small = tensors.broadcast_object(_join_tensors(saved, "solve", values))
        return LanczosState(basis=block[:rows], parked=block[rows:].clone(), **small)

    def _check_same_run(self, saved: dict[str, Any], source: str) -> None:
        """Raise NotFoundError where data or pretrained weights are not those the run began with."""
        for task, (name, classes) in zip(self.parts.tasks, saved["tasks"], strict=False):
            if task.name != name or list(task.classes) != list(classes):
                raise NotFoundError(
                    f"{source}: {task.name} has {len(task.classes)} classes that are not those of {name} when the run "
                    "began; put the data back, or begin a new run"
                )
        if tensors.broadcast_object(self.initial != saved["initial"]):
            raise NotFoundError(
                f"{source}: the backbone's first weights are not those the run began with (other pretrained weights, "
                "or another version of a library); put them back, or begin a new run"
            )


def _split_tensors(value: Any, prefix: str, found: dict[str, Tensor]) -> Any:
    """``value`` (nested mappings) with its tensors moved into ``found`` under ``prefix/key``."""
    if isinstance(value, Tensor):
        found[prefix] = value.detach().cpu()
        return {"tensor": prefix}
    if isinstance(value, Mapping):
        return {key: _split_tensors(item, f"{prefix}/{key}", found) for key, item in value.items()}
    return value


def _join_tensors(value: Any, prefix: str, values: Mapping[str, Tensor]) -> Any:
    """The reverse of `_split_tensors` on rank 0; None elsewhere, where there are no values."""
    if not tensors.is_main():
        return None
    if isinstance(value, Mapping) and set(value) == {"tensor"}:
        return values[prefix]
    if isinstance(value, Mapping):
        return {key: _join_tensors(item, f"{prefix}/{key}", values) for key, item in value.items()}
    return value


def _below(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): v for name, v in values.items() if name.startswith(f"{prefix}/")}


def _fingerprint(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
