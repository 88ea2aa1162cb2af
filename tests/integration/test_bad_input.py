"""Bad input on the command line of one process and of two: one error line, its exit code, no hang, no traceback.

Ranks are forked without torchrun here, so that rank 0 holds the group's store and takes it along when it ends; the real
launcher has its own tests (`test_train`, and at length `test_refusals`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.distributed.harness import ROOT, cpu_environment
from tests.integration.bad_input import CASES


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bad_input")
    command = [sys.executable, "-m", "tests.integration.bad_input", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return {(one["case"], one["ranks"]): one for one in json.loads((folder / "found.json").read_text())}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_is_refused(case: str, ranks: int, found: dict[tuple[str, int], dict[str, Any]]) -> None:
    _, code, message = CASES[case]
    one = found[case, ranks]
    assert one["codes"] == [code] * ranks, one["text"]
    (line,) = [line for line in one["text"].splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in one["text"]
    assert "frame #" not in one["text"]  # nor one of C++
    assert one["seconds"] < 30
