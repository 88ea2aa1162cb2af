"""The benchmarks run, at their smallest sizes, and what they write is what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import ROOT, cpu_environment

pytestmark = pytest.mark.long


def bench(tmp_path: Path, name: str, *words: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    command = [sys.executable, "-W", "ignore", "-m", f"bench.{name}", "--out", str(out), "--threads", "1", *words]
    done = subprocess.run(command, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_products(tmp_path: Path) -> None:
    words = (
        "--num-samples",
        "32",
        "--batch-size",
        "16",
        "--methods",
        "hessian,ggn",
        "--precisions",
        "float32",
        "--repeats",
        "1",
    )
    rows = {row["method"]: row for row in bench(tmp_path, "products", *words)["rows"]}
    assert rows["hessian"]["error"] < 1e-4
    assert rows["ggn"]["products_per_second"] > 0


def test_solvers(tmp_path: Path) -> None:
    words = ("--k", "4", "--num-samples", "64", "--epochs", "2", "--repeats", "1", "--solvers", "nostalgia,eigsh")
    rows = {row["solver"]: row for row in bench(tmp_path, "solvers", *words)["rows"]}
    assert rows["nostalgia"]["found"] == 4
    assert rows["nostalgia"]["worst_residual"] <= 1e-3
    assert rows["nostalgia"]["sine"] <= 1e-2


def test_projection(tmp_path: Path) -> None:
    (row,) = bench(tmp_path, "projection", "--parameters", "20000", "--k", "8", "--repeats", "1")["rows"][:1]
    assert row["gradient_reads"] <= 2
    assert row["constrained_reads"] <= 4
    assert row["leak"] <= 1e-5


def test_pipeline(tmp_path: Path) -> None:
    words = ("--num-images", "16", "--batch-size", "8", "--workers", "0", "--repeats", "1")
    assert all(row["ours_per_second"] > 0 for row in bench(tmp_path, "pipeline", *words)["rows"])
