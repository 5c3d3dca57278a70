"""Files that a server believes: nobody else may be able to write to them."""

from __future__ import annotations

from pathlib import Path

from polyrex.server.errors import StartError

_OTHERS_MAY_WRITE = 0o002


def check_private(path: Path) -> None:
    """Raise StartError where every user may write to a file or folder, OSError where it is not."""
    if path.stat().st_mode & _OTHERS_MAY_WRITE:
        kind = "folder" if path.is_dir() else "file"
        raise StartError(f"{path}: every user may write to this {kind}; chmod o-w it")
