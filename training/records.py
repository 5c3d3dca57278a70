"""Records of runs: JSON files that name the commit that made them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from polyrex.adapters.files.tensor_file import write_atomic


def current_commit() -> str:
    """The commit of this checkout, followed by `+` if the working tree differs from it."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def write_record(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON record, indented and sorted by key, so that a diff shows what changed."""
    write_atomic(path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())
