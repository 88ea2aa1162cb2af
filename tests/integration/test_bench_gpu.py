"""The command that runs everything a GPU is needed for: its stages, and what one that fails costs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import gpu


def test_every_stage_is_a_command_of_this_project(tmp_path: Path) -> None:
    for device in ("cuda", "cpu"):
        stages = gpu.all_stages(device, False, tmp_path)
        assert len({stage.name for stage in stages}) == len(stages)
        names = {stage.name for stage in stages}
        assert {"solvers", "products", "projection", "pipeline", "step-vit_b-whole", "ddp-kronecker"} <= names
        for stage in stages:
            assert stage.words[:2] == [sys.executable, "-m"]


def test_a_failing_stage_costs_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "good.json"
    write = f"import pathlib; pathlib.Path({str(file)!r}).write_text('{{\"rows\": [1]}}')"
    stages = [
        gpu.Stage("broken", [sys.executable, "-c", "raise SystemExit(3)"]),
        gpu.Stage("good", [sys.executable, "-c", write], writes_json=True),
    ]
    monkeypatch.setattr(gpu, "all_stages", lambda *_: stages)
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)]) == 4
    found = json.loads((tmp_path / "results.json").read_text())
    assert [stage["exit_code"] for stage in found["stages"]] == [3, 0]
    assert found["stages"][1]["result"] == {"rows": [1]}
    assert found["machine"]["device"] == "cpu"
    with pytest.raises(SystemExit):
        gpu.main(["--only", "nothing"])
