"""The compiled CPU operators: C++ in csrc/, built at first use and kept.

They are built for this machine's processor, by the compiler that `$CXX` names, or else by `c++`.
Without a compiler, the same formulas run in PyTorch's own operators, which is slower.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

logger = logging.getLogger(__name__)

_SOURCES = ("rank_space.cpp", "factored.cpp", "kronecker.cpp")
_HEADERS = ("mixers.h", "scratch.h", "simd.h", "tiles.h")
_COMPILE = ("-std=c++20", "-O3", "-march=native", "-fPIC", "-fvisibility=hidden", "-fopenmp")
# OpenMP is not linked: its symbols are found in the library that torch has loaded, and a second
# library would start a second set of threads.
_LINK = ("-shared", "-lc10", "-ltorch", "-ltorch_cpu")
_OTHERS_MAY_WRITE = 0o002


def cache_folder() -> Path:
    """The folder for files that polyrex makes once: $POLYREX_CACHE, or in the user's cache."""
    chosen = os.environ.get("POLYREX_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "polyrex"


@cache
def why_not_compiled() -> str | None:
    """Load the operators, `torch.ops.polyrex`; build them first if no earlier run has.

    Returns None if they are ready, or else the reason why not, which is logged once.
    """
    library = cache_folder() / "kernels" / f"routed-{_fingerprint()}.so"
    try:
        # for its owner alone: what lies here is run
        library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_ours(library.parent)
        if not library.exists():
            _build(library)
        _check_ours(library)
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        reason = f"the CPU operators were not built: {output.strip().splitlines()[0]}"
        logger.warning("%s; PyTorch's own operators stand in", reason)
        return reason
    return None


def _check_ours(path: Path) -> None:
    """Raise OSError where another user could have written what would be run from here."""
    found = path.stat()
    if found.st_uid not in (0, os.geteuid()):
        raise OSError(f"{path} belongs to another user")
    if found.st_mode & _OTHERS_MAY_WRITE:
        raise OSError(f"{path}: every user may write to this; chmod o-w it")


def _fingerprint() -> str:
    """A hash of all that a build depends on: sources, torch, flags and processor."""
    here = Path(__file__).parent / "csrc"
    parts = [(here / name).read_bytes() for name in (*_SOURCES, *_HEADERS)]
    parts.append(f"{torch.__version__} {_COMPILE} {_LINK} {_processor()}".encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """The processor's features as Linux lists them; on other systems, its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.uname().machine
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _build(library: Path) -> None:
    """Compile and link, then move the library into place: other processes may do the same.

    Raises OSError if there is no compiler, CalledProcessError if it fails.
    """
    logger.info("building the CPU operators (once)")
    compiler = os.environ.get("CXX", "c++")
    includes = [f"-I{path}" for path in include_paths()]
    libraries = [f"-L{path}" for path in library_paths()]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = []
        for name in _SOURCES:
            objects.append(f"{folder}/{name}.o")
            source = str(Path(__file__).parent / "csrc" / name)
            _run([compiler, *_COMPILE, *includes, "-c", source, "-o", objects[-1]])
        linked = f"{folder}/{library.name}"
        _run([compiler, *objects, *libraries, *_LINK, "-o", linked])
        os.replace(linked, library)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
