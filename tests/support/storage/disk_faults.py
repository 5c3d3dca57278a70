"""System calls that fail on the files of a registry in SQLite, and what the registry makes of it.

A run forks a server that makes a few changes while one call fails, notes what it says of each, and
kills itself as by kill -9. Then the file is opened again: what was acknowledged has to be there,
and what was refused must not.

    python -m support.storage.disk_faults --syncs 200 --writes 1000
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from mmap import mmap
from pathlib import Path
from struct import Struct

from sqlalchemy import insert, select

from polyrex.server.errors import StartError, StorageError
from polyrex.server.registry.database import Database
from polyrex.server.registry.principal import OPERATOR
from polyrex.server.registry.schema import audit, state, tenants
from polyrex.server.registry.storage.failures import OUTCOME_UNKNOWN
from polyrex.server.registry.storage.sqlite import Sqlite

KINDS = {"sync": 1, "write": 2}
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}
_FAULTS = Struct("qqqqq")
_SOURCE = Path(__file__).with_name("disk_faults.c")
_EVERY = 1 << 40  # calls: that one and all after it


@dataclass(frozen=True)
class Sweep:
    """What is tried, with a failing call of each number in `calls`."""

    kind: str
    error: str
    calls: Sequence[int]
    changes: int
    lasting: bool = False
    """Every later call fails, too."""
    from_start: bool = False
    """Calls are counted from the moment in which the registry is created."""
    until_failure: bool = False
    """The server is killed after the first change that fails."""
    settling: bool = True
    """False plants a defect: failed transactions stay in the log."""

    def __str__(self) -> str:
        modes = [name for name in ("lasting", "from_start", "until_failure") if getattr(self, name)]
        return "-".join([self.kind, self.error, *modes])


@dataclass(frozen=True)
class Result:
    """What the runs of a sweep gave, counted over all of them."""

    runs: int = 0
    failed: int = 0  # runs in which the call was reached
    acknowledged: int = 0
    refused: int = 0
    unknown: int = 0  # changes of which the server said that it does not know
    lost: int = 0  # acknowledged, and not there
    invented: int = 0  # refused, and there
    gaps: int = 0  # revisions that are missing
    unusable: int = 0  # files that could not be opened again

    def __add__(self, other: Result) -> Result:
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return Result(*(one + two for one, two in pairs))

    @property
    def sound(self) -> bool:
        """Whether nothing was lost, invented or damaged."""
        return not (self.lost or self.invented or self.gaps or self.unusable)


def build_shim(folder: Path) -> Path | None:
    """Compile the library that makes calls fail; None where there is no compiler."""
    compiler = shutil.which("gcc")
    if compiler is None:
        return None
    library = folder / "disk_faults.so"
    options = ["-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", str(library)]
    subprocess.run([compiler, *options, str(_SOURCE), "-ldl"], check=True)
    return library


def run_fault_sweeps(folder: Path, shim: Path, sweeps: Sequence[Sweep]) -> list[Result]:
    """Run sweeps in a folder, in a process of their own."""
    control = folder / "faults"
    control.write_bytes(bytes(_FAULTS.size))
    path = os.pathsep.join([str(_SOURCE.parents[2]), os.environ.get("PYTHONPATH", "")])
    settings = {"LD_PRELOAD": str(shim), "DISK_FAULTS": str(control), "PYTHONPATH": path}
    asked = json.dumps([asdict(sweep) for sweep in sweeps])
    done = subprocess.run(
        [sys.executable, "-m", "support.storage.disk_faults", "--sweeps", asked, folder],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [Result(**json.loads(line)) for line in done.stdout.splitlines()]


def main() -> None:
    """Run every sweep at a length that the command line gives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--syncs", type=int, default=200, help="the last of those that fail")
    parser.add_argument("--writes", type=int, default=1000, help="the last of those that fail")
    parser.add_argument("--sweeps", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("folder", nargs="?", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sweeps is not None:  # this process has the shim
        _run(arguments.folder, [Sweep(**each) for each in arguments.sweeps])
        return
    with tempfile.TemporaryDirectory() as name:
        shim = build_shim(Path(name))
        if shim is None:
            raise SystemExit("gcc is not installed")
        sweeps = every_sweep(arguments.syncs, arguments.writes)
        total = sum(run_fault_sweeps(Path(name), shim, sweeps), Result())
    print(json.dumps(asdict(total) | {"sound": total.sound}))


def every_sweep(syncs: int, writes: int) -> list[Sweep]:
    """Sweeps of the first calls of either kind and error, once and lastingly, early and later."""
    modes: list[dict[str, bool]] = [
        {},
        {"until_failure": True},
        {"lasting": True},
        {"from_start": True},
        {"from_start": True, "lasting": True},
    ]
    # A change makes one sync, and more than ten writes.
    lengths = {"sync": (syncs, syncs), "write": (writes, writes // 10 + 1)}
    return [
        Sweep(kind, error, list(range(1, last + 1)), changes, **mode)
        for kind, (last, changes) in lengths.items()
        for error in ERRORS
        for mode in modes
    ]


def _run(folder: Path, sweeps: Sequence[Sweep]) -> None:
    """Print the result of each sweep as a line."""
    # Most runs begin with a copy of one registry: creating it takes longer than all the rest.
    Database(_url(folder / "new")).close()
    with (folder / "faults").open("r+b") as file, mmap(file.fileno(), _FAULTS.size) as faults:
        for sweep in sweeps:
            runs = (_run_once(folder, faults, sweep, call) for call in sweep.calls)
            print(json.dumps(asdict(sum(runs, Result()))), flush=True)


def _run_once(folder: Path, faults: mmap, sweep: Sweep, call: int) -> Result:
    """Fork a server, let one call fail, and look at what it leaves behind."""
    registry = folder / "run"
    registry.mkdir()
    if not sweep.from_start:
        shutil.copyfile(folder / "new" / "registry.db", registry / "registry.db")
    count = _EVERY if sweep.lasting else 1
    armed = _FAULTS.pack(KINDS[sweep.kind], call, count, ERRORS[sweep.error], 0)
    faults[:] = bytes(_FAULTS.size)
    said = registry / "said"
    child = os.fork()
    if child == 0:
        try:
            _serve(registry, said, sweep, lambda: faults.__setitem__(slice(None), armed))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    reached = _FAULTS.unpack(faults[:])[-1] >= call
    faults[:] = bytes(_FAULTS.size)
    answers = dict(line.split() for line in said.read_text().splitlines())
    result = _look(registry, answers, reached=reached)
    shutil.rmtree(registry)
    return result


def _serve(registry: Path, said: Path, sweep: Sweep, arm: Callable[[], None]) -> None:
    """Make changes, and note in a file what is said of each."""
    if not sweep.settling:
        Sqlite.settle = lambda *_: False  # type: ignore[method-assign]
    with said.open("w", buffering=1) as answers:
        if sweep.from_start:
            arm()
        try:
            database = Database(_url(registry))
        except StartError:
            return
        if not sweep.from_start:
            arm()
        for number in range(sweep.changes):
            name = f"team-{number}"
            answer = _change(database, name)
            print(name, answer, file=answers)
            if sweep.until_failure and answer != "acknowledged":
                return


def _change(database: Database, name: str) -> str:
    try:
        with database.change(OPERATOR) as change:
            row = {"name": name, "created": 0.0, "quotas": {}}
            change.connection.execute(insert(tenants), row)
            change.record("create", "tenant", name)
    except StorageError as error:
        return "unknown" if str(error) == OUTCOME_UNKNOWN else "refused"
    return "acknowledged"


def _look(registry: Path, answers: Mapping[str, str], *, reached: bool) -> Result:
    """Open the registry after the server was killed, and compare it with what was said."""
    told = {
        answer: {name for name, each in answers.items() if each == answer}
        for answer in ("acknowledged", "refused", "unknown")
    }
    counts = {answer: len(names) for answer, names in told.items()}
    try:
        database = Database(_url(registry))
    except StartError:
        return Result(1, int(reached), **counts, unusable=1)
    with database.read() as connection:
        there = set(connection.scalars(select(tenants.c.name)))
        revision = connection.scalars(select(state.c.revision)).one()
        revisions: Sequence[int] = connection.scalars(select(audit.c.revision)).all()
    database.close()
    return Result(
        runs=1,
        failed=int(reached),
        **counts,
        lost=len(told["acknowledged"] - there),
        invented=len(told["refused"] & there),
        gaps=len(set(range(1, revision + 1)) ^ set(revisions)) + abs(len(there) - 1 - revision),
    )


def _url(registry: Path) -> str:
    return f"sqlite:///{registry / 'registry.db'}"


if __name__ == "__main__":
    main()
