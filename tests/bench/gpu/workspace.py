"""Makes this checkout importable as `polyrex` where nothing is installed; needs Python alone.

The folders are importable only under the name of their package, so the parts run with links to them
on their path. Packages that a machine lacks come from the wheels of a bundle (bundle.py).
"""

from __future__ import annotations

import os
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("adapters", "kernels", "server", "training")


def prepare(folder: Path, bundle: Path) -> dict[str, str]:
    """Fill an empty folder with links and packages; returns the environment of the parts."""
    (folder / "polyrex").mkdir()
    for name in PACKAGES:
        (folder / "polyrex" / name).symlink_to(ROOT / name, target_is_directory=True)
    for wheel in sorted((bundle / "wheels").glob("*.whl")):
        if not is_installed(wheel.name.partition("-")[0]):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
    path = [str(folder), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }


def is_installed(name: str) -> bool:
    """Whether Python has a distribution of this name: the machine's own packages come first."""
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
