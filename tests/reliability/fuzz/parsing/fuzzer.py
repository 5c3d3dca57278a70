"""One run of libFuzzer (atheris) on one target: it ends its process, so it has one of its own.

python -m reliability.fuzz.parsing.fuzzer TARGET FOLDER REPORT [planted] CORPUS -FLAG=VALUE ...
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["polyrex"]):
    from reliability.fuzz.parsing.targets import TARGETS, Target, guarded


def plant(target: Target) -> Target:
    """A defect: bytes with a character DEL are looked up in vain."""

    def planted(data: bytes) -> None:
        if b"\x7f" in data:
            raise KeyError("planted")
        target(data)

    found: Target = atheris.instrument_func(planted)
    return found


def peak() -> int:
    """The most memory that the process has had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Run, and report how many inputs were tried, and the memory before and after."""
    name, folder, report, *arguments = sys.argv[1:]
    target = guarded(TARGETS[name](Path(folder)))
    if arguments[0] == "planted":
        del arguments[0]
        target = plant(target)
    target(b"")
    tried, escaped, before = 0, "", peak()

    def one(data: bytes) -> None:
        nonlocal tried, escaped
        tried += 1
        try:
            target(data)
        except BaseException as error:
            escaped = repr(error)[:300]
            raise

    atheris.Setup([sys.argv[0], *arguments], one)
    try:
        atheris.Fuzz()
    finally:
        told = {"executions": tried, "escaped": escaped, "before": before, "after": peak()}
        Path(report).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
