"""How a process ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

# What an import in C++ does with KeyboardInterrupt: it comes out as another error.
INTERRUPTED = """
import os, signal, sys, time
from nostalgia.command import run_command
from nostalgia.utils.arguments import ended

def importing(argv):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    except KeyboardInterrupt:
        raise ImportError("half imported") from None

sys.exit({command})
"""


@pytest.mark.parametrize("command", ["run_command(None, importing, None)", "ended(importing, None)"])
def test_an_interrupt_in_the_middle_of_an_import_is_one_line(command: str) -> None:
    code = INTERRUPTED.format(command=command)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stderr) == (130, "interrupted\n")
