"""Reads routers that clients name by their path, below one folder and nowhere else."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from pathlib import Path

ROUTER = "router.safetensors"
"""The router of a folder that stands for one."""


def read_below(folder: Path, path: str, limit: int) -> bytes | None:
    """The first bytes of a file that lies in a folder, up to a limit; None where there is none.

    `path` is that of a file, or of a folder that holds the file ROUTER, absolute or from the
    folder on. Links are followed as far as they stay inside. Whatever else is wrong with a path,
    the answer is None, so that nobody learns what there is outside.
    """
    try:
        root = os.path.realpath(folder, strict=True)
        found = os.path.realpath(os.path.join(root, path), strict=True)
        if not Path(found).is_relative_to(root):
            return None
        if os.path.isdir(found):
            found = os.path.realpath(os.path.join(found, ROUTER), strict=True)
        return _read(root, Path(found).relative_to(root).parts, limit)
    except (OSError, ValueError):  # ValueError: not below the root, or no path at all
        return None


def _read(root: str, parts: tuple[str, ...], limit: int) -> bytes | None:
    """Read a file by way of its folders, none of which may have become a link in the meantime."""
    with ExitStack() as opened:
        at = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        opened.callback(os.close, at)
        for part in parts[:-1]:
            at = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            opened.callback(os.close, at)
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        file = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
        opened.callback(os.close, file)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            return None
        with open(file, "rb", closefd=False) as readable:
            return readable.read(limit)
