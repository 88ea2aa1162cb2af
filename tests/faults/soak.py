"""Breaks runs in every way they should survive, takes them up again, and compares the end with an undisturbed run.

python -m tests.faults.soak --kills 40          kill -9 at random events, each way to run: bit for bit the same
python -m tests.faults.soak --only signals      SIGTERM, SIGUSR1, SIGINT: exit code 75, then the same again
python -m tests.faults.soak --only crossing     1 -> 2 -> 1 ranks and DDP -> FSDP2 -> DDP: equal to rounding
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.faults import runs
from tests.ranks import Ranks

WAYS = {"single": (1, False), "ddp": (2, False), "fsdp2": (2, True)}


class Soak:
    """Breaks one way to run in a folder of its own."""

    def __init__(
        self, folder: Path, way: str, seed: int, words: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        self.folder, self.way, self.draw = folder, way, random.Random(f"{seed} {way}")
        self.world_size, self.fsdp = WAYS[way]
        self.words = (*runs.SMALL, f"dataset.batch_size={32 // self.world_size}", *words)
        self.environment = {**(environment or {}), **({"ACCELERATE_USE_FSDP": "true"} if self.fsdp else {})}
        self.problems: list[str] = []
        self.most_events = 600
        self.which: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def launch(self, run_dir: Path, kill: tuple[int, int] | None = None) -> Ranks:
        words = [*self.words, "--run-dir", str(run_dir), "--resume", "auto"]
        return Ranks(
            runs.disturbed, words, kill, world_size=self.world_size, folder=self.folder, environment=self.environment
        )

    def log(self) -> str:
        return (self.folder / "stdout").read_text() + (self.folder / "stderr").read_text()

    @functools.cached_property
    def whole(self) -> dict[str, Any]:
        codes = self.launch(self.folder / "whole").wait().codes
        assert codes == [0] * self.world_size, (codes, self.log()[-3000:])
        return runs.outcome(self.folder / "whole")

    def kills(self, count: int) -> None:
        """``count`` kills in all, over as many runs as it takes, at random events of a random rank."""
        expected, done = self.whole, 0
        while done < count:
            run_dir = self._fresh("killed")
            while True:
                # Few events lie between two checkpoints: most runs come some way before they are killed again.
                kill = (
                    (self.draw.randrange(self.world_size), self.draw.randrange(1, self.most_events))
                    if done < count
                    else None
                )
                codes = self.launch(run_dir, kill=kill).wait().codes
                if codes == [0] * self.world_size:
                    break
                if -signal.SIGKILL not in codes:
                    self._complain(f"kill {kill}: exit codes {codes}")
                    return
                done += 1
            self._compare(expected, run_dir, f"after {done} kills")

    def signals(self, count: int) -> None:
        """Each signal at ``count`` random moments: 75 on every rank within seconds, and the run goes on from there."""
        expected = self.whole
        for number in self.which * count:
            run_dir = self._fresh("stopped")
            ranks = self.launch(run_dir)
            while not (run_dir / "metrics.csv").exists():  # from then on signals are listened to
                time.sleep(0.05)
            time.sleep(0.3 + self.draw.random() * 4)
            ranks.send(number)
            sent = time.monotonic()
            codes = ranks.wait(60).codes
            took = time.monotonic() - sent
            if codes != [0] * self.world_size and codes != [75] * self.world_size:
                self._complain(f"{number.name}: exit codes {codes}")
            if took > 20:
                self._complain(f"{number.name}: {took:.1f} s to stop")
            codes = self.launch(run_dir).wait().codes
            if codes != [0] * self.world_size:
                self._complain(f"after {number.name}: exit codes {codes}")
                continue
            self._compare(expected, run_dir, f"after {number.name}")

    def disk(self, count: int) -> None:
        """A disk full at ``count`` moments (a tmpfs, so root only): code 4, and with more space the same end."""
        expected = self.whole
        size = sum(path.stat().st_size for path in (self.folder / "whole").rglob("*") if path.is_file())
        for i in range(count):
            disk = self._fresh("disk")
            disk.mkdir()
            small = f"size={(i + 0.5) * size / count / 2**10:.0f}k"
            subprocess.run(["mount", "-t", "tmpfs", "-o", small, "tmpfs", str(disk)], check=True)
            try:
                codes = self.launch(disk / "run").wait().codes
                if 4 not in codes or "Traceback" in self.log():
                    self._complain(f"disk of {small}: exit codes {codes}")
                subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
                codes = self.launch(disk / "run").wait().codes
                if set(codes) != {0}:
                    self._complain(f"disk of {small}, then more space: exit codes {codes}")
                else:
                    self._compare(expected, disk / "run", f"after a full disk of {small}")
            finally:
                subprocess.run(["umount", str(disk)], check=True)

    def _compare(self, expected: dict[str, Any], run_dir: Path, when: str) -> None:
        different = runs.differences(expected, runs.outcome(run_dir))
        self.problems += [f"{when}: {name}" for name in different]

    def _complain(self, what: str) -> None:
        self.problems.append(f"{what}: {self.log()[-1500:]}")

    def _fresh(self, name: str) -> Path:
        run_dir = self.folder / name
        shutil.rmtree(run_dir, ignore_errors=True)
        return run_dir


def crossing(folder: Path, ways: Sequence[str], kills: Sequence[int]) -> list[str]:
    """One run, taken up by another way to run after each kill; compared with the first way undisturbed.

    Without dropout, which draws by rank. Returns what differs by more than 1e-4 in a loss over the 40 steps after a
    change, or by more than two samples in an accuracy.
    """
    words = ("model.config.hidden_dropout_prob=0",)
    whole = Soak(folder, ways[0], 0, words)
    expected = whole.whole
    run_dir = folder / "crossed"
    for way, kill in zip(ways, [*kills, None], strict=True):
        soak = Soak(folder, way, 0, words)
        codes = soak.launch(run_dir, kill=None if kill is None else (0, kill)).wait().codes
        if (set(codes) != {0}) if kill is None else (-signal.SIGKILL not in codes):
            return [f"{way}, to be killed at {kill}: exit codes {codes}: {soak.log()[-1500:]}"]
    found = runs.outcome(run_dir)
    problems = []
    for one, two in zip(expected["rows"], found["rows"], strict=True):
        if one["split"] == two["split"] == "train" and abs(float(one["loss"]) - float(two["loss"])) > 1e-4:
            problems.append(f"{' -> '.join(ways)}: step {one['step']}: loss {one['loss']} and {two['loss']}")
    sizes = json.loads((folder / "whole/results/results.json").read_text())
    assert len(sizes["tasks"]) == len(expected["matrix"])
    for mine, other in zip(expected["matrix"], found["matrix"], strict=True):
        for a, b in zip(mine, other, strict=True):
            if a is not None and abs(a - b) > 2.01 / 64:  # of the samples that the short evaluation takes
                problems.append(f"{' -> '.join(ways)}: accuracies {a} and {b}")
    return problems


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["kills", "signals", "disk", "crossing"], help="one kind; all without it")
    parser.add_argument("--kills", type=int, default=40, help="for each way to run")
    parser.add_argument("--signals", type=int, default=3, help="of each signal, for each way to run")
    parser.add_argument("--which", type=signal.Signals.__getitem__, help="one signal, such as SIGTERM (default: all)")
    parser.add_argument("--disk", type=int, default=8, help="moments a disk is full, for each way to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}")
    options = parser.parse_args(words)
    failed = 0

    def tell(name: str, started: float, problems: list[str]) -> None:
        nonlocal failed
        failed += len(problems)
        result = "as undisturbed" if not problems else "\n  ".join(["DIFFERENT", *problems[:20]])
        print(f"{name} in {time.monotonic() - started:.0f} s: {result}", flush=True)

    for kind in ("kills", "signals", "disk") if options.only is None else (options.only,):
        for way in options.ways.split(",") if kind != "crossing" else ():
            with tempfile.TemporaryDirectory() as folder:
                started, soak = time.monotonic(), Soak(Path(folder), way, options.seed)
                soak.which = soak.which if options.which is None else (options.which,)
                count = getattr(options, kind)
                getattr(soak, kind)(count)
                tell(f"{way}: {count} {kind}", started, soak.problems)
    if options.only in (None, "crossing"):
        for ways in (("single", "ddp", "single"), ("ddp", "fsdp2", "ddp")):
            with tempfile.TemporaryDirectory() as folder:
                started = time.monotonic()
                tell(" -> ".join(ways), started, crossing(Path(folder), ways, (430, 300)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
