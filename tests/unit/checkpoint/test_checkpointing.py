"""What a run says where its checkpoint cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from accelerate import Accelerator

from nostalgia.errors import RunFailedError
from nostalgia.experiment.checkpointing import Checkpointer, Schedule
from tests.unit.checkpoint.test_store import contents


def test_a_full_disk_names_what_there_is_to_go_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    def words() -> str:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            writes.pause_point("step")
            with pytest.raises(RunFailedError) as raised:
                writes.close()
        return str(raised.value)

    writes = Checkpointer(tmp_path, Accelerator(cpu=True), Schedule(), lambda kind: contents(1, kind), print)
    assert "No space left on device; free space, then begin anew: there is none yet" in words()
    writes.pause_point("step")
    writes.close()
    assert "free space, then --resume goes on from the last whole one" in words()
