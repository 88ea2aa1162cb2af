"""The launch scripts: what they start, which exit codes they return, restarts, signals, several nodes, Slurm.

A stand-in for the program shows what the scripts do, and quickly; `test_two_nodes_are_one` runs the real one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import ROOT, cpu_environment
from tests.integration.stubs import slurm

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
TINY = (
    "--suite", "demo", "--debug", "--quiet", "train.max_steps_per_epoch=4", "train.max_eval_batches=2",
    "train.accelerator=cpu", "experiment.tasks=[digits,digits]",
    "nostalgia.top_k=2", "nostalgia.num_samples=32", "nostalgia.tol=0.2", "train.head_warmup_epochs=0",
    "dataset.batch_size=16", "nostalgia.predict_forgetting=false", "logger.tensorboard=false",
    "logger.report=false",
)  # fmt: skip


class Started:
    """A launch script under way; ``finish`` waits for it."""

    def __init__(self, script: str, *words: str, **environment: str) -> None:
        # The scripts say `python` and `torchrun`: those of the interpreter that runs the tests.
        path = os.pathsep.join([environment.get("PATH", os.environ["PATH"]), str(Path(sys.executable).parent)])
        ours = {**cpu_environment(), **environment, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{path}"}
        del ours["ACCELERATE_USE_CPU"]  # for the scripts to set
        self.process = subprocess.Popen(
            [str(LAUNCH / script), *words],
            cwd=ROOT,
            env=ours,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, timeout: float = 200) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, output


class Fake(Started):
    """A script with the stand-in for the program, which writes its notes into ``folder``."""

    def __init__(self, script: str, folder: Path, does: str, **environment: str) -> None:
        self.notes_folder = folder / "notes"
        self.notes_folder.mkdir()
        named = {"FAKE_NOTES": str(self.notes_folder), "FAKE_DOES": does, "OUTPUT_DIR": str(folder / "runs")}
        fake = {"NOSTALGIA_MODULE": "tests.integration.fake_program", **named}
        super().__init__(script, "--suite", "demo", "train.accelerator=cpu", **fake, **environment)

    def notes(self) -> dict[str, dict[str, Any]]:
        """What each process noted, by ``<attempt>-<rank>``."""
        return {path.stem: json.loads(path.read_text()) for path in sorted(self.notes_folder.glob("*.json"))}

    def wait_for(self, count: int) -> None:
        until(lambda: len(self.notes()) >= count or self.process.poll() is not None)


def until(condition: Callable[[], bool], seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def option(argv: list[str], name: str) -> str:
    return argv[argv.index(name) + 1]


@pytest.fixture(scope="module")
def under_way(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Fake]]:
    """Three launches side by side: most of their time is waiting."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("ddp", "fsdp", "slurm")}
    started = {
        "ddp": Fake("ddp.sh", folders["ddp"], "die,leave-4", NPROC="2"),
        "fsdp": Fake("fsdp.sh", folders["fsdp"], "wait", NPROC="1"),
        "slurm": Fake(
            "slurm.sbatch", folders["slurm"], "wait", NPROC="1", NOSTALGIA_HOME=str(ROOT),
            MASTER_PORT=free_port(), **slurm(folders["slurm"], nodes=2, job=71),
        ),
    }  # fmt: skip
    yield started
    for fake in started.values():
        if fake.process.poll() is None:
            fake.process.kill()


def test_a_dead_process_restarts_the_job_and_a_failed_run_does_not(under_way: dict[str, Fake]) -> None:
    """Rank 1 is killed: both start again in the same folder, and what the first attempt left is forgotten."""
    code, output = under_way["ddp"].finish()
    notes = under_way["ddp"].notes()
    assert code == 4, output
    assert list(notes) == ["0-0", "0-1", "1-0", "1-1"]
    assert all(note["WORLD_SIZE"] == "2" for note in notes.values())
    assert all(note["ACCELERATE_USE_CPU"] == "true" for note in notes.values())
    assert all(note["ACCELERATE_USE_FSDP"] is None for note in notes.values())
    assert all(note["argv"][:3] == ["--suite", "demo", "train.accelerator=cpu"] for note in notes.values())
    assert len({option(note["argv"], "--run-dir") for note in notes.values()}) == 1
    assert {option(note["argv"], "--resume") for note in notes.values()} == {"auto"}


def test_a_signal_reaches_the_program_and_its_code_comes_back(under_way: dict[str, Fake]) -> None:
    fake = under_way["fsdp"]
    fake.wait_for(1)
    fake.process.send_signal(signal.SIGUSR1)
    code, output = fake.finish()
    assert code == 75, output
    assert (fake.notes_folder / "0-0.signal").read_text() == "SIGUSR1"
    assert fake.notes()["0-0"]["ACCELERATE_USE_FSDP"] == "true"


def test_slurm_requeues_an_interrupted_job(under_way: dict[str, Fake], tmp_path: Path) -> None:
    fake = under_way["slurm"]
    fake.wait_for(2)
    fake.process.send_signal(signal.SIGUSR1)
    code, output = fake.finish()
    assert code == 75, output
    log = (fake.notes_folder.parent / "log").read_text().splitlines()
    assert log == ["--kill-on-bad-exit=0", "forwarded USR1", "scontrol requeue 71"]
    notes = fake.notes()
    assert list(notes) == ["0-0", "0-1"]
    assert {note["LOCAL_RANK"] for note in notes.values()} == {"0"}
    folders = {option(note["argv"], "--run-dir") for note in notes.values()}
    assert folders == {str(fake.notes_folder.parent / "runs" / "slurm-71")}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", "--external-sources", "--source-path", str(ROOT), script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("script", "words", "environment", "message"),
    [
        ("ddp.sh", ["train.epoch=3"], {}, "did you mean train.epochs"),
        ("ddp.sh", ["--suite", "demo"], {"NPROC": "two"}, "NPROC=two"),
        ("multinode.sh", ["--suite", "demo"], {"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is not set"),
        ("multinode.sh", [], {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "STRATEGY": "dp"}, "STRATEGY=dp"),
        ("debug.sh", ["train.epoch=3"], {}, "did you mean train.epochs"),
    ],
)
def test_wrong_usage_starts_nothing(script: str, words: list[str], environment: dict[str, str], message: str) -> None:
    code, output = Started(script, *words, **environment).finish()
    assert code == 2
    assert message in output
    assert len(output.splitlines()) == 1


def matrix(folder: Path) -> list[list[float | None]]:
    return json.loads((folder / "results" / "results.json").read_text())["accuracy_matrix"]


def losses(folder: Path) -> list[float]:
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    split, loss = rows[0].index("split"), rows[0].index("loss")
    return [float(row[loss]) for row in rows[1:] if row[split] == "train"]


def two_nodes(folder: Path, *words: str, **environment: str) -> list[Started]:
    """The same line on two "nodes" of this machine, one process each, meeting on the loopback."""
    meeting = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "NPROC": "1", **environment}
    words = (f"experiment.output_dir={folder}", *words)
    return [Started("multinode.sh", *words, NODE_RANK=str(node), **meeting) for node in (0, 1)]


@pytest.mark.exhaustive
def test_two_nodes_are_one(tmp_path: Path) -> None:
    """Two launches that meet give the numbers of one launch of two processes."""
    launches = [
        Started("ddp.sh", f"experiment.output_dir={tmp_path / 'one'}", *TINY, NPROC="2"),
        *two_nodes(tmp_path / "two", *TINY),
    ]
    for launch in launches:
        code, output = launch.finish(280)
        assert code == 0, output
    one, two = tmp_path / "one" / "latest", tmp_path / "two" / "latest"
    assert len(list((tmp_path / "two").glob("20*"))) == 1
    assert len(losses(one)) == 8
    assert losses(one) == losses(two)
    assert matrix(one) == matrix(two)


@pytest.mark.long
def test_two_nodes_with_fsdp_are_one(tmp_path: Path) -> None:
    launches = [
        Started("fsdp.sh", f"experiment.output_dir={tmp_path / 'one'}", *TINY, NPROC="2"),
        *two_nodes(tmp_path / "two", *TINY, STRATEGY="fsdp"),
    ]
    outputs = []
    for launch in launches:
        code, output = launch.finish(280)
        assert code == 0, output
        outputs.append(output)
    assert all("fsdp2" in output for output in outputs[:1])
    assert losses(tmp_path / "one" / "latest") == losses(tmp_path / "two" / "latest")
    assert matrix(tmp_path / "one" / "latest") == matrix(tmp_path / "two" / "latest")


SHORT = (
    "--suite", "demo", "--quiet", "train.accelerator=cpu", "train.epochs=4", "train.head_warmup_epochs=0",
    "nostalgia.top_k=4", "nostalgia.num_samples=64", "nostalgia.tol=0.1", "train.log_every_n_steps=1",
    "train.checkpoint_every_steps=5", "logger.report=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    code, output = Started("ddp.sh", *SHORT, RUN_DIR=str(folder), NPROC="2").finish(280)
    assert code == 0, output
    return folder


def workers(script: Started) -> list[int]:
    """Process ids of the ranks below a launch script: the children of its torchrun."""
    found = [script.process.pid]
    for _ in range(2):
        found = [int(line) for parent in found for line in children(parent)]
    return found


def children(parent: int) -> list[str]:
    return subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True).stdout.split()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_killed_rank_costs_no_more_than_a_restart(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    started = Started("ddp.sh", *SHORT, RUN_DIR=str(folder), NPROC="2")
    until(lambda: (folder / "metrics.csv").exists() and len(losses(folder)) > 60, 280)
    os.kill(workers(started)[-1], signal.SIGKILL)
    code, output = started.finish(280)
    assert code == 0, output
    assert "resuming from" in output
    assert losses(folder) == losses(undisturbed)
    assert matrix(folder) == matrix(undisturbed)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_slurm_ends_and_goes_on_in_the_same_folder(undisturbed: Path, tmp_path: Path) -> None:
    """Two nodes, SIGUSR1 in the middle, the requeued job goes on: the numbers of one node left alone."""
    stub = slurm(tmp_path, nodes=2, job=72)
    named = {"NOSTALGIA_HOME": str(ROOT), "NPROC": "1", "OUTPUT_DIR": str(tmp_path), **stub}
    folder = tmp_path / "slurm-72"
    first = Started("slurm.sbatch", *SHORT, MASTER_PORT=free_port(), **named)
    until(lambda: (folder / "metrics.csv").exists() and len(losses(folder)) > 60, 280)
    first.process.send_signal(signal.SIGUSR1)
    code, output = first.finish(280)
    assert code == 75, output
    assert "scontrol requeue 72" in (tmp_path / "log").read_text()
    assert not (folder / "results" / "results.json").exists()
    second = Started("slurm.sbatch", *SHORT, MASTER_PORT=free_port(), SLURM_RESTART_COUNT="1", **named)
    code, output = second.finish(280)
    assert code == 0, output
    assert losses(folder) == losses(undisturbed)
    assert matrix(folder) == matrix(undisturbed)
