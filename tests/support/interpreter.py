"""Runs tests under Triton's interpreter, in a process of its own: Triton decides at import."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def assert_pass_interpreted(folder: Path, tests: Sequence[str]) -> None:
    """Run `tests` of a folder, with its own conftest alone; the output is told if one fails."""
    options = ["--quiet", "--no-header", "-p", "no:cacheprovider", f"--confcutdir={folder}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(str(folder / test) for test in tests)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
