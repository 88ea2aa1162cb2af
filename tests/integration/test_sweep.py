"""The sweep's command line: what it runs, skips and refuses; the runs themselves are stood in for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from omegaconf import OmegaConf

from nostalgia import sweep as command
from nostalgia.config import Config, parse, save
from nostalgia.errors import UsageError
from nostalgia.experiment.method_choice import complete_method
from nostalgia.sweep_runner import Job, Sweep, gpu_slots, run_environment
from tests.distributed.harness import ROOT, cpu_environment
from tests.integration.stubs import torchrun
from tests.unit.analysis.folders import write_run


def start(folder: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    stub = torchrun(folder)
    # The stand-in for torchrun comes first on PATH, then the `python` of this interpreter.
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    out = f"experiment.output_dir={folder / 'runs'}"
    return subprocess.Popen(
        [sys.executable, "-m", "nostalgia.sweep", "--suite", "demo", "train.accelerator=cpu", out, *words],
        cwd=ROOT, env={**cpu_environment(), **stub, "PATH": path, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def sweep(folder: Path, *words: str, **environment: str) -> tuple[int, str, str]:
    process = start(folder, *words, **environment)
    output, errors = process.communicate(timeout=250)
    return process.returncode, output, errors


def ran(folder: Path) -> list[str]:
    """What was run since last asked."""
    log = folder / "ran"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


WORDS = ("--methods", "nostalgia,finetune", "--seeds", "0,1")


@pytest.mark.exhaustive
def test_a_sweep_goes_on_after_a_failure_and_then_runs_what_is_missing(tmp_path: Path) -> None:
    code, output, errors = sweep(tmp_path, *WORDS, STUB_finetune_0="fail")
    assert code == 4
    assert ran(tmp_path) == ["nostalgia 0", "finetune 0", "nostalgia 1", "finetune 1"]
    log = tmp_path / "runs" / "finetune" / "seed0.log"
    line = f"finetune seed 0 failed with exit code 4: task1_digits, epoch 3, step 7: the loss is not finite ({log})"
    assert errors.splitlines() == [f"error: {line}"]
    assert "0.550" in output  # nostalgia's mean over both seeds
    assert "±0.071" in output
    for seed in (0, 1):
        assert (tmp_path / "runs" / "nostalgia" / f"seed{seed}" / "results" / "results.json").exists()

    code, output, errors = sweep(tmp_path, *WORDS)
    assert (code, errors) == (0, "")
    assert ran(tmp_path) == ["finetune 0"]
    assert "4 runs, 3 complete already" in output
    page = (tmp_path / "runs" / "report.html").read_text()
    assert "nostalgia" in page
    assert "finetune" in page

    code, output, errors = sweep(tmp_path, *WORDS, "train.epochs=3")
    assert code == 2
    assert "holds a finished run of other settings (train.epochs was 15, is 3)" in errors
    code, output, errors = sweep(tmp_path, *WORDS, "--dry-run", "logger.tensorboard=false")
    assert code == 0
    assert output.count("complete ") == 5
    assert ran(tmp_path) == []


def test_a_signal_ends_a_sweep_with_checkpoints(tmp_path: Path) -> None:
    """Two runs at a time; the third is not started any more."""
    words = ("--methods", "nostalgia", "--seeds", "0,1,2", "--parallel", "2")
    process = start(tmp_path, *words, STUB_nostalgia_0="wait", STUB_nostalgia_1="wait")
    deadline = time.monotonic() + 60
    while not ((tmp_path / "ran").exists() and len((tmp_path / "ran").read_text().splitlines()) == 2):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)  # until both listen
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert errors.splitlines()[-1] == "interrupted: 3 of 3 runs are left; give the same line again"
    assert sorted(ran(tmp_path)) == ["nostalgia 0", "nostalgia 1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0,x"], "--seeds 0,x"),
        (["--seeds", "1,1"], "each once"),
        (["--methods", "nostlgia"], "did you mean nostalgia"),
        (["method=joint"], "use --methods"),
        (["--run-dir", "x"], "the sweep chooses it"),
        (["--methods", "ewc", "--strengths", "10,10"], "--strengths 10,10: finite numbers, and each once"),
        (["--methods", "ewc,si", "--strengths", "ewc=1,2,si=1,1.0"], "each once"),
        (["--methods", "ewc", "--strengths", "0.1,0.1000000000001"], "each once"),
        (["--methods", "ewc", "--strengths", "inf"], "finite numbers"),
        (["--methods", "ewc", "--strengths", "nan"], "finite numbers"),
        (["train.epoch=3"], "did you mean train.epochs"),
        (["--budget-minutes", "nan"], "--budget-minutes nan: allowed is 0 or more"),
    ],
)
def test_wrong_usage_runs_nothing(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = command.main(
        ["--suite", "demo", "train.accelerator=cpu", f"experiment.output_dir={tmp_path / 'runs'}", *words]
    )
    errors = capsys.readouterr().err
    assert code == 2
    assert message in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_an_option_that_one_of_the_methods_lacks_is_named_with_it() -> None:
    options = command.read_options(
        ["--methods", "ewc,finetune", "--seeds", "0", "--suite", "demo", "method.strength=3"]
    )
    with pytest.raises(UsageError, match=r"method=finetune: unknown key method.strength; .* methods.<name>.<option>="):
        command.cells(options)


def test_a_strength_is_run_as_it_is_named(tmp_path: Path) -> None:
    words = ["--methods", "ewc", "--seeds", "0", "--strengths", "12345678.5,1e6,0.12345671", "--suite", "demo"]
    options = command.read_options([*words, f"experiment.output_dir={tmp_path}"])
    given = [word for cell in command.cells(options) for word in cell.job.words if word.startswith("method.strength=")]
    assert [float(word.partition("=")[2]) for word in given] == [12345678.5, 1e6, 0.12345671]


def test_a_run_that_ended_while_it_wrote_its_export_goes_on(tmp_path: Path) -> None:
    """Its results were there; where there is no checkpoint to go on from, it stays complete."""
    words = ["--methods", "finetune", "--seeds", "0", "--suite", "demo", f"experiment.output_dir={tmp_path}"]
    options = command.read_options(words)
    (cell,) = command.cells(options)
    config = parse(list(cell.job.words)).config
    complete_method(config)
    folder = write_run(cell.job.folder, method="finetune")
    save(config, folder / "config.yaml")
    assert command.cells(options)[0].job.complete
    (folder / "checkpoints" / "000003_task3_end_of_task").mkdir(parents=True)
    assert not command.cells(options)[0].job.complete
    with pytest.raises(UsageError, match=r"train\.lr was"):  # of other settings all the same
        command.cells(command.read_options([*words, "train.lr=7"]))
    (folder / "export").mkdir()
    (folder / "results" / "report.html").touch()
    assert command.cells(options)[0].job.complete


def test_what_changes_no_number_of_a_finished_run_is_not_another_setting(tmp_path: Path) -> None:
    def whole(*more: str) -> Config:
        config = parse(["--suite", "demo", "method=nostalgia", f"experiment.output_dir={tmp_path}", *more]).config
        complete_method(config)
        return config

    saved: Any = OmegaConf.to_container(OmegaConf.structured(whole()), resolve=True)

    def changed(*more: str) -> list[str]:
        return [text.partition(" ")[0] for text in command.differences(saved, whole(*more))]

    free = ("train.guard_every_n_steps=7", "experiment.export=false", "logger.report=false", "train.keep_checkpoints=5")
    assert changed("experiment.name=other", "method.basis_placement=sharded", *free) == []
    assert changed("dataset.batch_size=7", "train.lr=1") == ["dataset.batch_size", "train.lr"]
    assert changed("curvature.rows_budget_bytes=9") == ["curvature.rows_budget_bytes"]


def test_runs_are_of_the_interpreter_that_the_sweep_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.defpath)  # no environment is activated
    found = run_environment("there", {"CUDA_VISIBLE_DEVICES": "1"})
    assert (found["RUN_DIR"], found["CUDA_VISIBLE_DEVICES"]) == ("there", "1")
    asked = subprocess.run(
        ["bash", "-c", "python -c 'import sys; print(sys.prefix)'"],
        env=found,
        capture_output=True,
        text=True,
        check=True,
    )
    assert asked.stdout.strip() == sys.prefix
    monkeypatch.setenv("PATH", os.pathsep.join(["/first", str(Path(sys.executable).parent)]))
    assert run_environment("there", {})["PATH"] == os.environ["PATH"]  # an order of the user's stays


def test_gpus_are_shared_out() -> None:
    one, two = gpu_slots(2, {}, ["0", "1", "2", "3", "4"])
    assert (one, two) == ({"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"})
    assert gpu_slots(3, {}, ["0"]) == [{}, {}, {}]
    assert gpu_slots(1, {}, ["0", "1"]) == [{}]


@pytest.mark.exhaustive
def test_strengths_are_searched_and_compared_and_a_failing_cell_costs_only_itself(tmp_path: Path) -> None:
    words = ("--methods", "finetune,ewc", "--seeds", "0,1", "--strengths", "1,10")
    code, _output, errors = sweep(tmp_path, *words, STUB_ewc_1="fail")
    assert code == 4
    assert len(ran(tmp_path)) == 6
    assert "ewc 1 seed 1 failed with exit code 4" in errors
    table = (tmp_path / "runs" / "frontier.md").read_text()
    assert "| finetune | - |" in table
    assert (tmp_path / "runs" / "ewc" / "strength_10" / "seed0" / "results" / "results.json").exists()
    code, _output, errors = sweep(tmp_path, *words, "--parallel", "2")
    assert code == 0, errors
    assert len(ran(tmp_path)) == 2
    whole = (tmp_path / "runs" / "frontier.json").read_text()
    assert "| ewc | 1 |" in (tmp_path / "runs" / "frontier.md").read_text()
    assert sweep(tmp_path, *words)[0] == 0
    assert (tmp_path / "runs" / "frontier.json").read_text() == whole
    code, _, errors = sweep(tmp_path, *words, "--select-seeds", "1")
    assert (code, errors.count("error")) == (2, 1)


@pytest.mark.exhaustive
def test_a_sweep_that_is_killed_and_begun_again_gives_the_same_table(tmp_path: Path) -> None:
    """One after another, in parallel, or killed in between with all that it had started."""
    words = ("--methods", "finetune,ewc", "--seeds", "0,1", "--strengths", "1,10")
    tables = {}
    for name, more in (("alone", ()), ("parallel", ("--parallel", "2")), ("killed", ())):
        folder = tmp_path / name
        folder.mkdir()
        if name == "killed":
            process = start(folder, *words)
            until = time.monotonic() + 100
            while len((folder / "ran").read_text().splitlines() if (folder / "ran").exists() else []) < 3:
                assert time.monotonic() < until
                time.sleep(0.02)
            for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                one.kill()
            process.communicate()
        code, _, errors = sweep(folder, *words, *more)
        assert (code, errors) == (0, "")
        tables[name] = (folder / "runs" / "frontier.md").read_text()
    assert tables["parallel"] == tables["alone"] == tables["killed"]


@pytest.mark.parametrize("code", [128 + signal.SIGTERM, 1])  # of the shell, of torchrun
def test_a_run_that_the_sweep_ends_before_it_listens_is_interrupted(tmp_path: Path, code: int) -> None:
    class Starting:
        def wait(self) -> int:
            sweep.stop(signal.SIGTERM, None)
            return code

        def send_signal(self, number: int) -> None:
            pass

    sweep = Sweep(1, lambda job, slot: Starting(), None)
    assert sweep.run(Job("ewc seed 0", tmp_path / "seed0", ())).code == 75
    killed = Sweep(1, lambda job, slot: SimpleNamespace(wait=lambda: 143), None)  # by somebody else
    assert killed.run(Job("ewc seed 1", tmp_path / "seed1", ())).code == 143
