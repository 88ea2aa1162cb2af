"""What a checkpoint of a run holds, and restoring a run from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nostalgia.checkpoint.codec import ReadOnce, StateCodec
from nostalgia.checkpoint.store import CheckpointContents, readable_checkpoint
from nostalgia.errors import NotFoundError
from nostalgia.experiment.components import Components
from nostalgia.experiment.heads import empty_heads
from nostalgia.experiment.identity import RunIdentity
from nostalgia.experiment.state import RunState
from nostalgia.models import norm_statistics
from nostalgia.models.adapters import merged_weights
from nostalgia.parallel import tensors
from nostalgia.parallel.modules import named_parameters
from nostalgia.parallel.random_state import capture_random_state, restore_random_state
from nostalgia.training.loop import SavedPhase, Training

if TYPE_CHECKING:
    from nostalgia.experiment.analysis import Analysis
    from nostalgia.experiment.resume import ResumedRun


class RunCheckpoint:
    """Makes the contents of a checkpoint from a run's state, and restores a run from them.

    Of the backbone only what changes is kept: the rest is built anew from the same weights, which `RunIdentity` makes
    sure of.
    """

    def __init__(self, run: Components, analysis: Analysis, initial: Mapping[str, Tensor], folder: Path) -> None:
        self.run, self.analysis, self.codec = run, analysis, StateCodec(folder)
        self.changing = {name for name, p in run.backbone.named_parameters() if p.requires_grad}
        if run.merges_adapters:
            self.changing |= set(merged_weights(run.backbone))
        self.identity = RunIdentity(run, initial)
        self.method_state: Any = None  # of a resumed run: to be given once more when its task has begun

    def take(self, kind: str, state: RunState, training: Training | None, log: dict[str, int]) -> CheckpointContents:
        """The contents of a checkpoint at this moment; a collective, empty of tensors on ranks other than 0."""
        run = self.run
        backbone: nn.Module = run.backbone
        if training is not None and state.stage != "baseline":  # which trains a head on a copy
            backbone = training.backbone
        phase = None if training is None else training.capture()
        # Between phases they are those the last task ended with, whichever an evaluation under way has put in; while a task
        # ends, those that its method has made of them so far.
        between = training is None and state.stage != "end" and len(run.norm_statistics) > 0
        own = run.norm_statistics[-1] if between else norm_statistics.capture(backbone)
        ranks = tensors.gather_objects({**capture_random_state(run.view.device), "norm": own})
        method = self.codec.encode(run.method.state_dict(), "method", f"method={run.method.name}")
        analysis = self.codec.encode(self.analysis.state(), "analysis", "analysis")
        label = f"task{state.round}_{state.stage}" if kind != "end_of_task" else f"task{state.round - 1}_{kind}"
        values = tensors.to_main(self._kept(backbone))
        if not tensors.is_main():
            return CheckpointContents(label, kind, {}, {})
        values.update(_named("heads", {name: head.state_dict() for name, head in run.heads.items()}))
        values.update(_named("norm", {str(i): s for i, s in enumerate(run.norm_statistics)}))
        values.update({f"phase/{k}": v for k, v in phase.tensors.items()} if phase is not None else {})
        values.update({**method.values, **analysis.values})
        rest = [_split_tensors(rank, f"ranks/{i}", values) for i, rank in enumerate(ranks)]
        content = {
            "run": state.to_json(),
            "phase": None if phase is None else phase.position,
            "scaler": None if run.accelerator.scaler is None else run.accelerator.scaler.state_dict(),
            "method": method.plain,
            "analysis": analysis.plain,
            "log": log,
            "ranks": rest,
            **self.identity.saved,
        }
        # A tensor may stand under two names (the statistics of jointly trained tasks); in a file it is its own.
        values = {name: value.contiguous().clone() for name, value in values.items()}
        return CheckpointContents(label, kind, content, values, {**method.references, **analysis.references})

    def restore(self, resumed: ResumedRun) -> RunState:
        """Put ``resumed`` into the run's components; a collective. The phase in progress is left to its owner.

        Raises NotFoundError for a checkpoint that is whole but not one of this run, or of no run.
        """
        with readable_checkpoint(resumed.source):
            return self._restore(resumed)

    def restore_random_state(self, resumed: ResumedRun) -> None:
        if resumed.random_state is not None:
            restore_random_state(resumed.random_state, self.run.view.device)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _restore(self, resumed: ResumedRun) -> RunState:
        run, saved = self.run, resumed.state
        assert saved is not None
        self.identity.check(saved, resumed.source)
        values, source = resumed.values, resumed.source
        state = RunState.from_json(saved["run"])
        tensors.from_main(self._kept(run.backbone), values, source)
        ranks = tensors.broadcast_object([_join_tensors(r, f"ranks/{i}", values) for i, r in enumerate(saved["ranks"])])
        rank, count = run.accelerator.process_index, len(ranks)
        if count != run.accelerator.num_processes and tensors.is_main():
            for line in self._other_ranks(count):
                print(line, flush=True)
        norm_statistics.apply(run.backbone, ranks[rank % count]["norm"])
        resumed.random_state = ranks[rank] if rank < count else None
        run.heads.update(empty_heads(run, state.tasks))
        own = norm_statistics.capture(run.backbone)
        run.norm_statistics += [{k: v.clone() for k, v in own.items()} for _ in range(state.tasks)]
        targets = _named("heads", {name: head.state_dict() for name, head in run.heads.items()})
        targets.update(_named("norm", {str(i): s for i, s in enumerate(run.norm_statistics)}))
        tensors.from_main(targets, values, source)
        self.analysis.load_state(self._decode(saved["analysis"], resumed))
        self.method_state = self._decode(saved["method"], resumed)
        if isinstance(self.method_state, Mapping):
            self.method_state = ReadOnce(self.method_state)
        self.load_method(source)
        if run.accelerator.scaler is not None and saved["scaler"]:
            run.accelerator.scaler.load_state_dict(saved["scaler"])
        if saved["phase"] is not None:
            resumed.phase = SavedPhase(saved["phase"], _below("phase", values))
        return state

    def load_method(self, source: str) -> None:
        """Give the method its state; raises NotFoundError naming it where the state is not one of its own."""
        name = self.run.method.name
        with readable_checkpoint(f"{source}, method={name}"):
            # Called twice within a task: what the method does with the first must not change the second.
            state = self.method_state.fresh() if isinstance(self.method_state, ReadOnce) else self.method_state
            self.run.method.load_state_dict(state)

    def check_method(self, source: str) -> None:
        """Raise NotFoundError for a part of the method's state that it has not taken up: it would be lost."""
        unread = self.method_state.unread if isinstance(self.method_state, ReadOnce) else []
        if unread:
            raise NotFoundError(
                f"{source}, method={self.run.method.name}: load_state_dict does not read {', '.join(unread)}, which its state "
                "in the checkpoint has; go on with the class that wrote it"
            )

    def _other_ranks(self, count: int) -> list[str]:
        """What makes training on another number of ranks than ``count`` differ by more than rounding."""
        backbone, note = self.run.backbone, f"note: the run was on {count} ranks, it goes on with"
        own_batches = norm_statistics.has_batch_norm(backbone) and not backbone.norm_frozen
        whole = any(isinstance(m, nn.SyncBatchNorm) for m in backbone.modules())
        found = []
        if backbone.draws_in_training():
            found.append("attention dropout or stochastic depth is drawn by each rank anew")
        if own_batches and not whole:
            found.append("batch norm in training is over each rank's own batch")
        return [
            f"{note} {self.run.accelerator.num_processes}: {why}, so that what follows is not equal up to rounding, only "
            "alike"
            for why in found
        ]

    def _decode(self, plain: Any, resumed: ResumedRun) -> Any:
        run = self.run
        return self.codec.decode(plain, resumed.values, resumed.references, run.space, run.view.device)

    def _kept(self, backbone: nn.Module) -> dict[str, Tensor]:
        parameters = named_parameters(backbone)
        return {f"backbone/{name}": p.detach() for name, p in parameters.items() if name in self.changing}


def _named(prefix: str, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """``prefix/group/key`` of every tensor of ``groups``."""
    return {f"{prefix}/{group}/{key}": value for group, values in groups.items() for key, value in values.items()}


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
