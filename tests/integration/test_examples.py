"""The files of examples/ run, together as one run of one's own; the Python in docs/ is these files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from examples.own_method import Options, Pulling
from tests.distributed.harness import ROOT, cpu_environment

EXAMPLES = ROOT / "examples"
SHORT = (
    "train.epochs=1 train.warmup_epochs=0 train.head_warmup_epochs=0 train.accelerator=cpu dataset.num_workers=0 "
    "logger.tensorboard=false"
)


def python(folder: Path, *words: str) -> str:
    """What a command prints that runs in ``folder``."""
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=cpu_environment(), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.exhaustive
def test_data_model_method_and_figure_of_ones_own(tmp_path: Path) -> None:
    python(tmp_path, str(EXAMPLES / "own_data.py"))
    python(tmp_path, str(EXAMPLES / "own_model.py"))
    words = "experiment.tasks=[digits,./my_images] model=vit model.model_id=./my_model train.max_steps_per_epoch=4"
    python(
        tmp_path, "-m", "nostalgia.train", *words.split(), *SHORT.split(), "method=examples.own_method:Replaying",
        "experiment.name=own",
    )  # fmt: skip
    run = tmp_path / "runs" / "own" / "latest"
    results = json.loads((run / "results" / "results.json").read_text())
    assert results["method"] == "replaying"
    assert results["classes"][1] == ["even", "odd"]
    assert results["memory_bytes"] > 0  # 20 images a task
    python(tmp_path, "-m", "nostalgia.report", str(run), "--figure", "examples.own_figure:loss_drop")
    page = (run / "results" / "report.html").read_text()
    assert "Your figures" in page
    assert "The first and the last logged training loss of each task." in page


def test_the_regulariser_adds_the_gradient_of_its_penalty() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64))
    method = Pulling(Options(strength=0.3))
    method.task = SimpleNamespace(parameters={"p": p})  # type: ignore[assignment]
    start = p.detach().clone()
    method.begin_task(method.task)
    with torch.no_grad():
        p += torch.randn(5, generator=generator, dtype=torch.float64)
    p.grad = torch.ones_like(p)
    method.gradients()
    (penalty,) = torch.autograd.grad(0.15 * (p - start).square().sum(), p)
    torch.testing.assert_close(p.grad, 1 + penalty, rtol=1e-12, atol=0)


def test_the_loop_stays_out_of_the_memory(tmp_path: Path) -> None:
    assert float(python(tmp_path, str(EXAMPLES / "own_loop.py"))) < 1e-5  # the leak, of float32 rounding


@pytest.mark.exhaustive
def test_the_notebook_runs(tmp_path: Path) -> None:
    """Its cells, one after the other in one Python; the last line of a cell may be a value to show."""
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    checks = [
        "assert len(run.tasks) == len(run.matrix) == 2 and run.matrix[1][1] is not None",
        "assert len(run.curvature) >= 1 and run.curvature[0].eigenvalues[0] > 0",
    ]
    python(tmp_path, "-c", "\n".join([*codes, *checks]))


def test_python_in_the_documents_is_included_from_the_examples() -> None:
    pages = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    blocks = re.findall(r"```python\n(.*?)```", pages, re.DOTALL)
    included = [re.fullmatch(r"--8<--\n(examples/\w+\.py)\n--8<--\n", block) for block in blocks]
    assert all(included)
    assert {ROOT / found[1] for found in included if found} == set(EXAMPLES.glob("own_*.py"))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 65
