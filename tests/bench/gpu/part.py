"""One part of `make gpu`: what it is told, the time that it has, and the figures that it keeps."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from polyrex.training.records import current_commit, write_record

PACKAGES = ("torch", "triton", "transformers", "peft")


class Part:
    """A part that runs now. Every figure is printed and on disk before the next is measured."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.dry: bool = options.dry_run
        self.device = torch.device("cpu" if self.dry else "cuda")
        self.bundle: Path = options.bundle
        self.work: Path = options.work
        self.path: Path = options.out / f"{name}.json"
        self._end: float = time.monotonic() + options.seconds
        self._started = time.monotonic()
        self._document: dict[str, Any] = {
            "part": name,
            "dry_run": self.dry,
            "machine": machine(),
            "finished": False,
            "figures": {},
            "left_out": {},
        }

    @property
    def left(self) -> float:
        """Seconds that remain of the part's time."""
        return self._end - time.monotonic()

    def add(self, key: str, figures: dict[str, Any]) -> None:
        """Print and keep what was measured."""
        print(f"{key}: {json.dumps(figures)}", flush=True)
        self._document["figures"][key] = figures
        self._write()

    def leave_out(self, key: str, reason: object) -> None:
        """Print why something was not measured, and keep the first line of it."""
        print(f"{key}: left out: {reason}", flush=True)
        self._document["left_out"][key] = str(reason).partition("\n")[0]
        self._write()

    def try_to(self, key: str, measure: Callable[[], dict[str, Any] | None], least: float) -> None:
        """Measure and keep one figure, unless less than `least` seconds remain or it fails.

        One failure must not cost the other figures: it is recorded in this one's place.
        """
        if self.left < least:
            self.leave_out(key, "no time left")
            return
        try:
            figures = measure()
        except Exception as error:
            traceback.print_exc()
            self.leave_out(key, f"{type(error).__name__}: {error}")
            if self.dry:
                raise
        else:
            if figures is not None:
                self.add(key, figures)

    def reload(self) -> None:
        """Take up what another process has written for this part."""
        self._document = json.loads(self.path.read_text())

    def finish(self) -> None:
        """Say that the part went through to its end."""
        self._document["finished"] = True
        self._write()

    def _write(self) -> None:
        self._document["seconds"] = round(time.monotonic() - self._started, 1)
        write_record(self.path, self._document)


def run_as_part(name: str, description: str | None, measure: Callable[[Part], None]) -> None:
    """The command of a part's module."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON file")
    parser.add_argument("--bundle", type=Path, required=True, help="folder of `make gpu-bundle`")
    parser.add_argument("--work", type=Path, required=True, help="folder of what is kept for later")
    parser.add_argument("--seconds", type=float, default=600, help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at tiny sizes")
    options = parser.parse_args()
    if options.dry_run:  # Triton decides at import
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        sys.exit("this measures a GPU, and this machine has no CUDA device; try --dry-run")
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    part = Part(name, options)
    measure(part)
    part.finish()


def machine() -> dict[str, Any]:
    """The device and all versions that figures depend on."""
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": current_commit(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["memory_gb"] = round(properties.total_memory / 1e9, 1)
        found["capability"] = f"{properties.major}.{properties.minor}"
    return found | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()[0].strip()
