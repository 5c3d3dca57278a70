"""Coverage-guided fuzzing of what reads bytes from anybody: only declared errors come out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from reliability.fuzz.parsing.targets import TARGETS, seeds
from reliability.fuzz.served import environment
from reliability.result import Result
from support.reliability.small_base import SmallBase

SLICE = 100_000
"""Inputs tried by one process: a run that is broken off loses at most these."""
MOST_GAINED = 128.0
"""MiB that a process may gain, over what it had when its target was ready."""
_LARGEST = 8192  # bytes of an input
_SECONDS = 10  # that one input may take


@dataclass
class Tally:
    """What the fuzzers of all targets have done."""

    executions: int = 0
    escaped: int = 0  # errors that are none of the server's, and inputs that take too long
    gained: float = 0.0  # MiB, the most of any process
    remarks: list[str] = field(default_factory=list)


def parsers(
    small: SmallBase,
    work: Path,
    *,
    executions: int,
    targets: Sequence[str] = tuple(TARGETS),
    planted: bool = False,
) -> Result:
    """Try so many inputs, the same number on each target.

    `work` keeps the corpus of each target, and how many inputs were tried: a run that was broken
    off goes on from there. It also gets every input from which an error escapes.
    """
    tally = Tally()
    for name in targets:
        _fuzz(small, work, name, executions // len(targets), tally, planted=planted)
    return Result(
        goal="coverage-guided fuzzing of uploads, bodies, names and chats",
        length=f"{tally.executions} inputs on {', '.join(targets)}",
        figures={
            "inputs": tally.executions,
            "errors that are not declared": tally.escaped,
            "MiB that a process gained": round(tally.gained, 1),
        },
        at_most={"errors that are not declared": 0, "MiB that a process gained": MOST_GAINED},
        at_least={"inputs": executions // len(targets) * len(targets)},
        remarks=tally.remarks,
    )


def _fuzz(
    small: SmallBase, work: Path, name: str, wanted: int, tally: Tally, *, planted: bool
) -> None:
    corpus, progress = work / name, work / f"{name}.json"
    corpus.mkdir(exist_ok=True)
    for seed in seeds(name, small.base.parent):
        (corpus / sha256(seed).hexdigest()).write_bytes(seed)
    done: int = json.loads(progress.read_text()) if progress.exists() else 0
    tally.executions += done
    while done < wanted and not tally.escaped:
        runs = min(SLICE, wanted - done)
        report = _run(small, work, name, runs, 1 + done, planted=planted)
        tally.gained = max(tally.gained, (report["after"] - report["before"]) / 1024)
        tally.executions += report["executions"]
        if report["escaped"]:
            tally.escaped += 1
            tally.remarks.append(f"{name}: {report['escaped']}")
            return
        done += report["executions"]
        progress.write_text(json.dumps(done))


def _run(
    small: SmallBase, work: Path, name: str, runs: int, seed: int, *, planted: bool
) -> dict[str, Any]:
    """One process. Where an error has escaped, `escaped` says which; its input lies in `work`.

    What ends the process at once, such as a time limit, is said in libFuzzer's words.
    """
    report = work / f"{name}-report.json"
    flags = {
        "atheris_runs": runs,
        "seed": seed,
        "max_len": _LARGEST,
        "timeout": _SECONDS,
        "rss_limit_mb": 4096,
        "artifact_prefix": f"{work / name}-",
    }
    command = [
        sys.executable,
        "-m",
        "reliability.fuzz.parsing.fuzzer",
        name,
        small.base.parent,
        report,
    ]
    command += ["planted"] if planted else []
    command += [work / name, *(f"-{flag}={value}" for flag, value in flags.items())]
    done = subprocess.run(
        [str(part) for part in command],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output = done.stdout.decode(errors="replace")
    if not report.exists() and "libFuzzer" not in output:
        raise RuntimeError(output[-4000:])
    if not report.exists():
        return {"executions": 0, "escaped": output[-1500:], "before": 0, "after": 0}
    found: dict[str, Any] = json.loads(report.read_text())
    report.unlink()
    return found
