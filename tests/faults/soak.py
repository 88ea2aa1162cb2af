"""Kills runs at random moments, takes them up again, and compares the end with an undisturbed run, bit for bit.

python -m tests.faults.soak --kills 40
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import forking

WAYS = {"1 rank": (1, False), "2 ranks DDP": (2, False), "2 ranks FSDP2": (2, True)}


def soak(folder: Path, world_size: int, fsdp: bool, kills: int, seed: int, words: tuple[str, ...] = ()) -> list[str]:
    """Runs of ``kills`` kills in all; returns what differed from the undisturbed one."""
    words = (*forking.SMALL, *words)
    log = folder / "log"
    codes = forking.run([*words, "--run-dir", str(folder / "whole")], world_size, fsdp=fsdp, log=log)
    assert codes == [0] * world_size, (codes, log.read_text()[-3000:])
    expected = forking.outcome(folder / "whole")
    draw, done, problems = random.Random(seed), 0, []
    while done < kills:
        run_dir = folder / "broken"
        shutil.rmtree(run_dir, ignore_errors=True)
        while True:
            kill = (draw.randrange(world_size), draw.randrange(1, 250)) if done < kills else None
            command = [*words, "--run-dir", str(run_dir), "--resume", "auto"]
            codes = forking.run(command, world_size, fsdp=fsdp, kill=kill, log=log)
            if codes == [0] * world_size:
                break
            if -9 not in codes:
                problems.append(f"kill {kill}: exit codes {codes}: {log.read_text()[-1500:]}")
                return problems
            done += 1
        problems += [f"after {done} kills: {name}" for name in forking.differences(expected, forking.outcome(run_dir))]
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="for each way to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}")
    options = parser.parse_args()
    forking.preload()
    failed = 0
    for way in options.ways.split(","):
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            problems = soak(Path(folder), *WAYS[way], options.kills, options.seed)
        failed += len(problems)
        result = "bitwise equal" if not problems else "\n  ".join(["DIFFERENT", *problems[:20]])
        print(f"{way}: {options.kills} kills in {time.monotonic() - started:.0f} s: {result}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
