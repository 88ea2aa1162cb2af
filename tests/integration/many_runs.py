"""Several command lines in one process, or in one group of ranks."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from nostalgia import evaluate, train
from tests.integration.suite_data import accept_checksums


def main(lines: Sequence[tuple[str, list[str], str | None]]) -> None:
    """Each of (command, words, root of the data sets)."""
    Accelerator.end_training = lambda self: None  # the group goes on to the next run
    for command, words, root in lines:
        # Each task of a run collects garbage: it need not look through what the libraries and earlier runs have made.
        gc.collect()
        gc.freeze()
        if root is not None:
            accept_checksums(Path(root))
        code = {"train": train.main, "evaluate": evaluate.main}[command](words)
        assert code == 0, f"{command} {words}: exit code {code}"
        print(f"finished: {time.process_time():.0f} s CPU: {command} {' '.join(words)}", flush=True)
