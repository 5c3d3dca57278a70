"""`make gpu`: proves and measures on a GPU, in under ten minutes, without a network.

    PYTHONPATH=tests python3 -m bench.gpu --parts kernels,engine

Each part runs as a process of its own, prints every result as soon as it has it, and keeps them in
`--out`: a JSON file a part, and README.md with their tables. A part that runs out of its time, or
fails, loses nothing that it has measured. Nothing has to be installed but torch, triton and
transformers; whatever else a part needs comes from the bundle of `make gpu-bundle`.

`--dry-run` goes through all parts on the CPU at tiny sizes; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from bench.gpu.workspace import ROOT, prepare

PARTS = {
    "tests": ("triton_tests", 65),
    "kernels": ("kernels", 100),
    "engine": ("engine", 225),
    "training": ("training", 110),
    "study": ("study", 70),
}
"""Each part's module, and its share of the time, in seconds of the default budget."""
BUDGET = sum(seconds for _, seconds in PARTS.values())
GRACE = 10
"""Seconds that a part has to end by itself when its time is over."""


def parts_of(text: str) -> list[str]:
    """The parts of a list with commas, in the order in which they run."""
    chosen = text.split(",")
    unknown = sorted(set(chosen) - set(PARTS))
    if unknown:
        raise argparse.ArgumentTypeError(
            f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}"
        )
    return [part for part in PARTS if part in chosen]


def command_of(part: str) -> list[str]:
    """How a part is started."""
    return [sys.executable, "-m", f"bench.gpu.parts.{PARTS[part][0]}"]


def run_part(part: str, seconds: float, arguments: list[str], environment: dict[str, str]) -> int:
    """Run one part for about so many seconds; its exit status, -9 if it had to be ended."""
    command = [*command_of(part), *arguments, "--seconds", f"{seconds:.0f}"]
    process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(seconds + GRACE)
    except subprocess.TimeoutExpired:
        print(f"{part}: ended, its time was over", flush=True)
        return -signal.SIGKILL
    finally:  # what the part started, too; also when somebody interrupts this command
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_parts(options: argparse.Namespace, environment: dict[str, str]) -> list[str]:
    """Run the parts one after another; those that failed. Time that one leaves, others get."""
    arguments = ["--out", str(options.out), "--bundle", str(options.bundle)]
    arguments += ["--work", str(options.work), *(["--dry-run"] if options.dry_run else [])]
    end, failed = time.monotonic() + options.budget, []
    for number, part in enumerate(options.parts):
        waiting = sum(PARTS[later][1] for later in options.parts[number:])
        share = (end - time.monotonic()) * PARTS[part][1] / waiting - GRACE
        print(f"== {part}, {share:.0f} s", flush=True)
        if run_part(part, max(1.0, share), arguments, environment) != 0:
            failed.append(part)
        table = [sys.executable, "-m", "bench.gpu.table", "--out", str(options.out)]
        subprocess.run(table, env=environment, cwd=ROOT, check=True)
    return failed


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", type=parts_of, default=list(PARTS), help=f"with commas: {','.join(PARTS)}"
    )
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds for all parts; default: %(default)s"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "tests" / "results" / "gpu", help="folder for results"
    )
    parser.add_argument(
        "--bundle", type=Path, default=ROOT / "build" / "gpu-bundle", help="of `make gpu-bundle`"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build" / "gpu-work",
        help="folder where the study goes on in the next run",
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at tiny sizes")
    options = parser.parse_args()
    for name in ("out", "bundle", "work"):
        setattr(options, name, getattr(options, name).resolve())
    with tempfile.TemporaryDirectory() as folder:
        failed = run_parts(options, prepare(Path(folder), options.bundle))
    print((options.out / "README.md").read_text())
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
