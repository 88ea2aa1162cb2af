"""README and docs/ are true: every command in them runs, every error line is the program's.

A command runs as it stands, but for what its entry in COMMANDS changes to make it short. Those of the program itself
run one after the other in one process, which saves most of the time; launch scripts start a stand-in for torchrun that
reads the program's command line and writes results without training.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.harness import ROOT, cpu_environment
from tests.integration.stubs import slurm, torchrun
from tests.unit.test_imports import TIERS

pytestmark = pytest.mark.timeout(900)  # half a minute on an idle machine; a busy one takes its time

README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
TEXT = "\n".join([README, *PAGES.values()])

# Words that make a run of the program short.
RUN = (
    "train.epochs=1 train.warmup_epochs=0 train.head_warmup_epochs=0 train.max_steps_per_epoch=2 "
    "train.max_eval_batches=1 nostalgia.top_k=2 nostalgia.num_samples=32 nostalgia.tol=0.5 train.accelerator=cpu "
    "nostalgia.predict_forgetting=false logger.tensorboard=false"
)
ACCELERATE = "accelerate launch --config_file accelerate_config.yaml"
WHOLE = "logger.tensorboard=true nostalgia.predict_forgetting=true"  # every file of a run is looked for
# The program in the driver below; the same, in the long tests only; a shell; a shell with stand-ins.
HERE, LATER, SHELL, STUBS = "here", "later", "shell", "stubs"

# Each command of README and docs/: how it is run, and with what words after it, or after = what stands for it.
COMMANDS: dict[str, tuple[str, str]] = {
    "make demo": (SHELL, "=make -n demo | grep launch/demo.sh"),
    "make test": (SHELL, "=make -n test | grep 'python -m pytest'"),
    "python -m venv .venv && . .venv/bin/activate": (SHELL, "=python -m venv --without-pip v && . v/bin/activate"),
    'pip install -e ".[dev]"': ("tests/integration/test_wheel.py", ""),
    "launch/demo.sh": (STUBS, "=OUTPUT_DIR=runs/stub launch/demo.sh train.accelerator=cpu"),
    "pytest": (SHELL, "=python -m pytest --version"),
    "python -m nostalgia.train --help": (HERE, ""),
    "python -m nostalgia.train --suite demo --dry-run": (HERE, ""),
    "python -m nostalgia.plan --suite demo --gpus 64 --nodes 8": (HERE, ""),
    "launch/debug.sh --suite demo": (
        LATER, f"=python -m nostalgia.train --debug --suite demo {RUN} experiment.name=other",
    ),
    "python -m nostalgia.train --suite demo": (HERE, f"{RUN} {WHOLE}"),
    "python -m nostalgia.train --suite demo method=finetune": (LATER, RUN + " experiment.name=other"),
    "python -m nostalgia.train dataset=digits experiment.split=classes experiment.num_tasks=5 model=vit_tiny": (
        LATER, RUN + " experiment.num_tasks=2",
    ),
    "launch/ddp.sh --suite demo": (STUBS, "train.accelerator=cpu experiment.name=stub"),
    "launch/fsdp.sh --suite demo": (STUBS, "train.accelerator=cpu experiment.name=stub"),
    f"{ACCELERATE} --num_processes 8 -m nostalgia.train --suite demo": (
        SHELL, f"={ACCELERATE} --num_processes 1 --cpu -m nostalgia.train --help",
    ),
    **{
        f"NNODES=2 NODE_RANK={rank} MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 launch/multinode.sh --suite demo": (
            STUBS, "train.accelerator=cpu experiment.name=stub",
        )
        for rank in (0, 1)
    },
    "sbatch --nodes=2 launch/slurm.sbatch --suite demo": (STUBS, "train.accelerator=cpu"),
    "python -m nostalgia.sweep --suite demo --methods nostalgia,finetune,joint --seeds 0,1,2": (
        STUBS, "train.accelerator=cpu experiment.name=stub --seeds 0",
    ),
    "python -m nostalgia.sweep --suite demo --methods kronecker,finetune --seeds 0,1,2": (
        STUBS, "train.accelerator=cpu experiment.name=stub --seeds 0",
    ),
    "python -m nostalgia.train --resume runs/demo/latest": (HERE, ""),
    "python -m nostalgia.train --suite demo --resume latest": (LATER, RUN),
    "RUN_DIR=runs/demo/mine launch/ddp.sh --suite demo": (
        STUBS, "=RUN_DIR=runs/stub/mine launch/ddp.sh --suite demo train.accelerator=cpu",
    ),
    "python examples/own_data.py": (HERE, ""),
    "python -m nostalgia.train --suite demo experiment.tasks=[digits,./my_images]": (
        HERE, RUN + " method=finetune experiment.name=other",
    ),
    "python examples/own_model.py": (HERE, ""),
    "python -m nostalgia.train dataset=digits experiment.split=classes model=vit model.model_id=./my_model": (
        LATER, RUN + " experiment.name=other",
    ),
    "python -m nostalgia.train dataset=digits experiment.split=classes model=resnet18 dataset.image_size=32 "
    "model.pretrained=false": (LATER, RUN + " experiment.name=other dataset.batch_size=8 method=finetune"),
    "python -m nostalgia.train --suite demo method=examples.own_method:Pulling method.strength=0.5": (
        HERE, RUN + " experiment.name=other",
    ),
    "python -m nostalgia.train --suite demo method=examples.own_method:Replaying": (HERE, RUN + " experiment.name=other"),
    "python -m nostalgia.sweep --suite demo --methods nostalgia,examples.own_method:Pulling --seeds 0": (
        STUBS, "train.accelerator=cpu experiment.name=stub",
    ),
    "python -m nostalgia.scripts.plot_all --results_dir runs/demo/latest/results": (HERE, ""),
    "python -m nostalgia.report runs/demo/latest --figure examples.own_figure:loss_drop": (HERE, ""),
    "python -m nostalgia.figures runs/demo/latest --figure examples.own_figure:loss_drop": (
        HERE, "",
    ),
    "python -m nostalgia.figures runs/demo/latest": (HERE, ""),
    "python -m nostalgia.evaluate runs/demo/latest": (HERE, ""),
    "python -m nostalgia.report runs/demo/latest": (HERE, ""),
    "python -m nostalgia.report runs/demo/nostalgia/seed0 runs/demo/finetune/seed0 --out report.html": (
        HERE, "=python -m nostalgia.report runs/demo/latest runs/other/latest --out report.html",
    ),
    "python -m nostalgia.train --config runs/demo/latest/config.yaml": (LATER, ""),
    **{
        f"python -m bench.{name}": ("tests/integration/test_bench.py", "")
        for name in ("products", "solvers", "projection", "step", "pipeline")
    },
    "python -m bench.study": ("tests/unit/test_results_page.py", ""),
    "python -m tests.faults.soak": ("tests/faults/test_soak.py", ""),
}  # fmt: skip

# Runs commands of the program in one process, in order; says for each how it ended, and what it printed where badly.
DRIVER = r"""
import contextlib, io, json, os, runpy, shlex, sys, traceback

os._exit = lambda code: sys.exit(code)  # how the program leaves after an error
for command in json.load(sys.stdin):
    words = shlex.split(command)[1:]
    output, code = io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            sys.argv = words[1:] if words[0] == "-m" else words
            if words[0] == "-m":
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc(file=output)
            code = 1
    print(json.dumps([command, code, output.getvalue()]), flush=True)
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands() -> list[str]:
    """Every line of the bash blocks of README and docs/, without its comment."""
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


def short(command: str) -> str:
    words = COMMANDS[command][1]
    return words.removeprefix("=") if words.startswith("=") else f"{command} {words}".strip()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the checkout, and takes what the commands write."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("nostalgia", "configs", "examples", "launch", "Makefile", "accelerate_config.yaml", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def environment(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    stubs = tmp_path_factory.mktemp("stubs")
    named = {**torchrun(stubs), **slurm(stubs, nodes=2, job=5)}
    path = os.pathsep.join([str(stubs), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**cpu_environment(), **named, "PATH": path, "PYTHONPATH": str(place)}


def drive(place: Path, environment: dict[str, str], wanted: list[str]) -> dict[str, tuple[int, str]]:
    """Exit code and output of commands of the program, run in order."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=place,
        env=environment,
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        timeout=800,
    )
    ended = {line[0]: (line[1], line[2]) for line in map(json.loads, done.stdout.splitlines())}
    assert set(ended) == set(wanted), done.stderr
    return ended


@pytest.fixture(scope="module")
def driven(place: Path, environment: dict[str, str]) -> dict[str, tuple[int, str]]:
    return drive(place, environment, [short(name) for name, (how, _) in COMMANDS.items() if how == HERE])


@pytest.fixture(scope="module")
def driven_later(place: Path, environment: dict[str, str]) -> dict[str, tuple[int, str]]:
    later = [short(name) for name, (how, _) in COMMANDS.items() if how == LATER]
    return drive(
        place,
        environment,
        [short("python examples/own_model.py"), short("python -m nostalgia.train --suite demo"), *later],
    )


def test_every_command_is_in_the_table() -> None:
    """And nothing else is."""
    assert dict.fromkeys(commands()) == dict.fromkeys(COMMANDS)


@pytest.mark.exhaustive
@pytest.mark.parametrize("command", [name for name, (how, _) in COMMANDS.items() if how == HERE])
def test_commands_of_the_program(command: str, driven: dict[str, tuple[int, str]]) -> None:
    code, output = driven[short(command)]
    assert code == 0, output
    assert output.strip() or "examples/own_" in command


@pytest.mark.long
@pytest.mark.parametrize("command", [name for name, (how, _) in COMMANDS.items() if how == LATER])
def test_further_commands_of_the_program(command: str, driven_later: dict[str, tuple[int, str]]) -> None:
    code, output = driven_later[short(command)]
    assert code == 0, output
    assert output.strip()


@pytest.mark.exhaustive
@pytest.mark.parametrize("command", [name for name, (how, _) in COMMANDS.items() if how in (SHELL, STUBS)])
def test_commands_of_the_shell(command: str, place: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", "-c", short(command)], cwd=place, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_commands_tested_elsewhere() -> None:
    elsewhere = [how for how, _ in COMMANDS.values() if how not in (HERE, LATER, SHELL, STUBS)]
    assert all((ROOT / file).is_file() for file in elsewhere)


def test_every_suite_is_listed() -> None:
    suites = {path.stem for path in (ROOT / "configs" / "suite").glob("*.yaml")}
    listed = README.split("## Suites")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+`) \|", listed, re.MULTILINE)
    assert sorted(suites) == sorted(name for row in rows for name in re.findall(r"`(\w+)`", row))


def test_error_lines_are_the_program_s() -> None:
    fragments = re.findall(r"^\| `([^`]+)` \|", PAGES["troubleshooting.md"], re.MULTILINE)
    source = "\n".join(path.read_text() for path in (ROOT / "nostalgia").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)  # texts that go on in the next line
    assert len(fragments) > 10
    assert [text for text in fragments if text not in joined] == []


@pytest.mark.exhaustive
def test_files_of_a_run_are_there(driven: dict[str, tuple[int, str]], place: Path) -> None:
    """Each file that docs/runs.md names is in the folder of a finished run."""
    section = PAGES["runs.md"].split("With `A[t, u]`")[0]
    names = re.findall(r"`([^`]+)`", "\n".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)))
    assert len(names) >= 10
    run = place / "runs" / "demo" / "latest"
    for name in names:
        assert list(run.glob(name.replace("<i>", "*"))), name


def test_the_readme_stays_short() -> None:
    assert len(README.splitlines()) <= 200


def test_links_lead_to_files() -> None:
    """Those of docs/ among themselves are checked by mkdocs; README's lead into the checkout."""
    linked = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(linked) > 5
    assert [name for name in linked if "://" not in name and not (ROOT / name).exists()] == []


def test_the_table_of_layers_is_current() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", PAGES["architecture.md"], re.MULTILINE)
    assert [(int(i), tuple(re.findall(r"`(\w+)`", names))) for i, names in rows] == list(enumerate(TIERS))


def test_pictures_are_there() -> None:
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / name).is_file(), name
