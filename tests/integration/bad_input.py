"""Runs bad command lines in forked processes, one and two ranks each; leaves codes and output as JSON.

    python -m tests.integration.bad_input FOLDER

A process of its own, so that nothing but one thread is forked; imports are paid for once.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults import forking

TINY = ("model=vit_tiny", "train.epochs=1", "dataset.num_workers=0")
DIGITS = ("dataset=digits", *TINY)


def tree(folder: Path) -> Path:
    from tests.unit.data.trees import write_tree

    return write_tree(folder, ("ant", "bee"))


def empty(folder: Path) -> list[str]:
    (folder / "nothing").mkdir()
    return [f"dataset={folder / 'nothing'}", *TINY]


def class_missing(folder: Path) -> list[str]:
    val = tree(folder / "animals") / "val" / "bee"
    for image in val.iterdir():
        image.unlink()
    val.rmdir()
    return [f"dataset={folder / 'animals'}", *TINY]


def unreadable(folder: Path) -> list[str]:
    sorted((tree(folder / "animals") / "train" / "bee").iterdir())[1].write_bytes(b"no image")
    return [f"dataset={folder / 'animals'}", *TINY]


def in_the_way(folder: Path) -> list[str]:
    (folder / "file").write_text("in the way")
    return [*DIGITS, f"experiment.output_dir={folder / 'file' / 'runs'}"]


def from_others(folder: Path) -> list[str]:
    (folder / "config.yaml").write_text("experiment: !!python/object/apply:os.system ['true']\n")
    return ["--config", str(folder / "config.yaml")]


Words = Callable[[Path], list[str]]
# name: (words, exit code, what the line says)
CASES: dict[str, tuple[Words, int, str]] = {
    "unknown dataset": (lambda _: ["dataset=digts", *TINY], 2, "did you mean digits"),
    "unknown suite": (lambda _: ["--suite", "dem"], 2, "did you mean demo"),
    "unknown model": (lambda _: ["dataset=digits", "model=vitt"], 2, "did you mean vit"),
    "unknown key": (lambda _: [*DIGITS, "train.epoch=3"], 2, "did you mean train.epochs"),
    "unknown option": (lambda _: ["--suit", "demo"], 2, "did you mean --suite"),
    "no directions": (lambda _: [*DIGITS, "nostalgia.top_k=0"], 2, "nostalgia.top_k=0: allowed is"),
    "more directions than parameters": (
        lambda _: [*DIGITS, "nostalgia.top_k=99999999"], 2, "nostalgia.top_k=99999999: allowed 1 to",
    ),
    "no tasks": (lambda _: [*DIGITS, "experiment.tasks=[]"], 2, "experiment.tasks=[]: name at least one task"),
    "empty folder": (empty, 3, "nothing: empty"),
    "class missing from validation": (class_missing, 3, "class 'bee' is missing from validation"),
    "unreadable image": (unreadable, 3, "bee"),
    "output folder in the way": (in_the_way, 2, "cannot be written (Not a directory); name another folder"),
    "a name that leads out": (lambda _: [*DIGITS, "experiment.name=../x"], 2, "experiment.name='../x': allowed is"),
    "a configuration with code": (from_others, 2, "a tag (tag:yaml.org,2002:python"),
    "no such configuration": (lambda f: ["--config", str(f / "none.yaml")], 2, "no such file"),
    "contradictory": (lambda _: [*DIGITS, "nostalgia.k_max=3"], 2, "is below nostalgia.top_k"),
    "another number of devices": (lambda _: [*DIGITS, "train.devices=3"], 2, "the launcher decides"),
}  # fmt: skip


def main(folder: Path) -> None:
    forking.preload()
    found = []
    for name, (words, _, _) in CASES.items():
        for ranks in (1, 2):
            place = folder / f"{name} {ranks}".replace(" ", "_")
            place.mkdir(parents=True)
            line = [*words(place), "--quiet"]
            if not any(word.startswith("experiment.output_dir=") for word in line):
                line.append(f"experiment.output_dir={place / 'runs'}")
            log, started = place / "log", time.monotonic()
            log.touch()
            codes = forking.run(line, ranks, log=log, timeout=60)
            seconds = time.monotonic() - started
            found.append({"case": name, "ranks": ranks, "codes": codes, "text": log.read_text(), "seconds": seconds})
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
