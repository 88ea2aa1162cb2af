"""The README's library example runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.distributed.harness import ROOT, cpu_environment


def test_the_library_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 15
    done = subprocess.run(
        [sys.executable, "-c", example], env=cpu_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5
