"""A launcher that starts ranks again calls them as it did at first."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import Accelerator

from nostalgia.config import parse
from nostalgia.errors import UsageError
from nostalgia.experiment.resume import open_run


def test_ranks_started_again_go_on_in_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, accelerator = tmp_path / "run", Accelerator(cpu=True)
    request = parse(["--suite", "demo", "--run-dir", str(folder)])
    made, resumed = open_run(request, accelerator)
    assert (made, resumed) == (folder, None)
    with pytest.raises(UsageError, match="holds a run already; add --resume auto"):
        open_run(request, accelerator)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    made, resumed = open_run(request, accelerator)
    assert made == folder
    assert resumed is not None
