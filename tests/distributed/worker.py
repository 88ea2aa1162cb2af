"""One rank of a distributed test: initialises gloo, calls the case, leaves its result in a file."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> None:
    case, kwargs, folder = sys.argv[1:4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    module, function = case.split(":")
    result = getattr(importlib.import_module(module), function)(**json.loads(kwargs))
    (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    # Without the interpreter's end: gloo's threads now and then abort a process that tears them down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
