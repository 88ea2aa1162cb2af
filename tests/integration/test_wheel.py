"""The wheel works where there is no checkout: its configuration travels with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.harness import ROOT, cpu_environment


def call(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**cpu_environment(), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, beside the libraries of this environment."""
    pytest.importorskip("hatchling", reason="building needs hatchling, which the dev extra brings")
    built, target = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    done = call(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built, ROOT, cwd=built)
    assert done.returncode == 0, done.stderr
    (wheel,) = built.glob("nostalgia-*.whl")
    done = call(*pip, "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=built)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.exhaustive
def test_the_demo_is_there_without_a_checkout(installed: Path, tmp_path: Path) -> None:
    program = "import nostalgia, nostalgia.config.compose as c; print(nostalgia.__file__, c.config_folder())"
    where = call(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(installed))
    module, configs = where.stdout.split()
    assert Path(module).parent == Path(configs).parent == installed / "nostalgia"
    words = ("-m", "nostalgia.train", "--suite", "demo", "--dry-run")
    done = call(sys.executable, *words, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert "task3_digits" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_every_configuration_file_is_in_the_wheel(installed: Path) -> None:
    here = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    folder = installed / "nostalgia" / "configs"
    assert {path.relative_to(folder) for path in folder.rglob("*.yaml")} == here


def test_types_and_licence_travel_along(installed: Path) -> None:
    assert (installed / "nostalgia" / "py.typed").is_file()
    (licence,) = installed.glob("nostalgia-*.dist-info/licenses/LICENSE")
    assert licence.read_text() == (ROOT / "LICENSE").read_text()


def test_the_command_returns_its_code(installed: Path, tmp_path: Path) -> None:
    command = installed / "bin" / "nostalgia-train"
    assert os.access(command, os.X_OK)
    done = call(command, "--suite", "demos", cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 2
    assert "did you mean demo?" in done.stderr
