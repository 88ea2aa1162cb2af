"""Stands in for nostalgia.train under the launch scripts: notes how each process was started, then does as told.

``FAKE_NOTES``: folder for the notes. ``FAKE_DOES``: what each process does, by attempt (``die,leave-4``): ``done``;
``leave-N`` as the program does with code N; ``die`` (rank 1 kills itself, the others wait until they are ended and
leave 75, as if asked to stop); ``wait`` for a signal and leave 75.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from nostalgia.utils.exit_code import already_ended, leave

KEPT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "TORCHELASTIC_RESTART_COUNT")


def main() -> None:
    if already_ended():
        return
    notes, rank = Path(os.environ["FAKE_NOTES"]), os.environ["RANK"]
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])

    def stop(number: int, frame: FrameType | None) -> None:
        (notes / f"{attempt}-{rank}.signal").write_text(signal.Signals(number).name)
        leave(75)

    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    note = {"argv": sys.argv[1:], "pid": os.getpid(), **{name: os.environ.get(name) for name in KEPT}}
    (notes / f"{attempt}-{rank}.tmp").write_text(json.dumps(note))
    (notes / f"{attempt}-{rank}.tmp").replace(notes / f"{attempt}-{rank}.json")
    plan = os.environ.get("FAKE_DOES", "done").split(",")
    what = plan[min(attempt, len(plan) - 1)]
    if what.startswith(("leave-", "die")):
        # Not before all have begun: one that begins later would find the code and end at once, or be ended unnoted.
        while len(list(notes.glob(f"{attempt}-*.json"))) < int(os.environ["WORLD_SIZE"]):
            time.sleep(0.1)
    if what.startswith("leave-"):
        leave(int(what.removeprefix("leave-")))
    if what == "die" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if what in ("die", "wait"):
        time.sleep(60)
        leave(1)


if __name__ == "__main__":
    main()
