"""The benchmarks at their smallest: they run as commands, write valid JSON, and their numbers are sane."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import ROOT, cpu_environment, launch_command

pytestmark = pytest.mark.long


def read(out: Path, name: str) -> dict[str, Any]:
    results = json.loads(out.read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    assert results["benchmark"] == name
    assert results["machine"]["torch"]
    return results


def bench(name: str, folder: Path, *words: str) -> dict[str, Any]:
    """What ``python -m bench.<name>`` writes to its --out; in this process, which has imported torch already."""
    out = folder / "out.json"
    importlib.import_module(f"bench.{name}").main(["--device", "cpu", "--out", str(out), *words])
    return read(out, name)


def test_products_on_two_ranks(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ["--device", "cpu", "--out", str(out), "--num-samples", "4", "--batch-size", "2", "--repeats", "1"]
    words += ["--precisions", "float32,bf16", "--methods", "hessian_kept,difference,ggn"]
    command = [*launch_command(2), "-m", "bench.products", *words]
    done = subprocess.run(command, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "GGN, double backward" in done.stdout
    results = read(out, "products")
    assert (results["world_size"], results["parameters"]) == (2, 136650)
    rows = {(row["method"], row["precision"]): row for row in results["rows"]}
    assert rows["gradient", "float32"]["collectives"] == [1, 0]
    for method in ("hessian_kept", "ggn"):
        exact, rough = rows[method, "float32"], rows[method, "bf16"]
        assert exact["collectives"] == rough["collectives"] == [2, 0]
        assert exact["bytes"] == 2 * 4 * 136650
        assert exact["error"] < 1e-5 < rough["error"] < 0.2
        assert exact["products_per_second"] == pytest.approx(1 / exact["seconds"])
    assert rows["difference", "float32"]["error"] < 0.02
    assert "noise" in rows["difference", "bf16"]["refused"]


def test_solvers(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    words = ("--k", "2", "--num-samples", "4", "--batch-size", "4", "--epochs", "1", "--repeats", "1")
    solvers = "nostalgia,curvlinops,eigenthings_lanczos,pyhessian"
    rows = {row["solver"]: row for row in bench("solvers", tmp_path, *words, "--solvers", solvers)["rows"]}
    assert len(rows) == 4
    us = rows["nostalgia"]
    assert (us["found"], us["order"]) == (2, "largest")
    assert us["worst_residual"] <= 1e-3
    assert us["sine"] < 1e-2
    assert us["held_bytes"] >= 20 * 4 * 136650  # the whole basis of 2 k + 16
    for row in rows.values():
        if "absent" in row:
            assert "pip install" in row["absent"]
            continue
        assert row["product_error"] < 1e-2
        assert row["products"] >= 4
        assert 0 < row["cpu_seconds"] < 100
        assert 2 * 4 * 136650 * 0.9 < row["held_bytes"] < 2**28


def test_projection(tmp_path: Path) -> None:
    words = ("--parameters", "20000", "--k", "4", "--repeats", "2", "--dtypes", "float32,bfloat16")
    for row in bench("projection", tmp_path, *words)["rows"]:
        assert row["basis_bytes"] == 4 * 20000 * {"float32": 4, "bfloat16": 2}[row["dtype"]]
        assert row["gradient_reads"] + row["constrained_reads"] <= 4
        assert row["gradient_reads"] == 2
        assert row["leak"] < 1e-5
        assert row["limit_seconds"] > 0


def test_step(tmp_path: Path) -> None:
    words = ("--steps", "2", "--repeats", "1", "--batch-size", "4", "--threads", "1")
    results = bench("step", tmp_path, *words)
    assert results["commit"]
    rows = {row["method"]: row for row in results["rows"]}
    assert set(rows) == {"finetune", "nostalgia32", "nostalgia128", "kronecker", "kronecker+anchor"}
    for row in rows.values():
        ((ours, theirs),) = row["windows_ms"]
        assert row["ratio"] == pytest.approx(ours / theirs)
        assert all(row["parts_ms"][part] > 0 for part in ("loader", "passes", "clip", "optimizer", "step", "log"))
    # What a method adds shows in its own part, and what the distillation adds in the passes.
    assert rows["nostalgia128"]["parts_ms"]["gradients"] > 10 * rows["finetune"]["parts_ms"]["gradients"]
    assert rows["kronecker+anchor"]["parts_ms"]["passes"] > rows["kronecker"]["parts_ms"]["passes"]


def test_pipeline(tmp_path: Path) -> None:
    results = bench(
        "pipeline", tmp_path, "--num-images", "6", "--batch-size", "4", "--workers", "0,1", "--repeats", "1"
    )
    assert {(row["mode"], row["workers"]) for row in results["rows"]} == {
        ("train", 0), ("train", 1), ("eval", 0), ("eval", 1)
    }  # fmt: skip
    assert results["bytes"] > 6 * 10_000  # photographs
    for row in results["rows"]:
        assert row["ours_per_second"] > 0
        assert row["ratio"] == pytest.approx(row["ours_per_second"] / row["plain_per_second"])


@pytest.mark.parametrize(
    ("name", "words", "named"),
    [
        ("pipeline", ["--workers", "two"], "--workers two"),
        ("projection", ["--k", "0"], "--k 0"),
        ("solvers", ["--solvers", "arnoldi"], "arnoldi"),
        ("products", ["--num-samples", "99999"], "--num-samples 99999"),
        ("products", ["--device", "tpu"], "--device tpu"),
        ("step", ["--network", "resnet50", "--lora"], "--lora with --network resnet50"),
        ("step", ["--steps", "0"], "--steps 0"),
    ],
)
def test_wrong_words_are_refused_in_one_line(
    name: str, words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"bench.{name}").main(["--device", "cpu", *words])
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert named in line
    assert line.count("\n") == 1
