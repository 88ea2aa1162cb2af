"""Runs several command lines in one process (or one group of ranks): starting one takes longer than its run.

python -m tests.integration.many_runs FILE      a JSON list of [command, words, dataset root]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from accelerate import Accelerator

from nostalgia import evaluate, train
from tests.integration.suite_data import accept_checksums


def main() -> None:
    Accelerator.end_training = lambda self: None  # the group goes on to the next run
    for command, words, root in json.loads(Path(sys.argv[1]).read_text()):
        if root is not None:
            accept_checksums(Path(root))
        code = {"train": train.main, "evaluate": evaluate.main}[command](words)
        assert code == 0, f"{command} {words}: exit code {code}"
        print(f"finished: {time.process_time():.0f} s CPU: {command} {' '.join(words)}", flush=True)


if __name__ == "__main__":
    main()
