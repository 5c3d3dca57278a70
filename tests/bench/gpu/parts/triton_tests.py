"""Part 1: the tests of the Triton kernels, on the device, and that they see a planted defect."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.gpu.part import Part, run_as_part
from bench.gpu.workspace import ROOT, is_installed

TESTS = ROOT / "tests" / "kernels" / "gpu"
SERVED = "test_packed_modules_of_an_engines_layer"
"""The tests that take their layers from the builder, where the defect is planted."""
MOST_NAMES = 20


def run_tests(part: Part, report: Path, *options: str, quiet: bool = False) -> dict[str, Any]:
    """Run tests in processes of their own: how many there are of each outcome, and which failed."""
    command = [sys.executable, "-m", "pytest", "--quiet", "--no-header", "--tb=line"]
    # The outcome must not depend on what other versions of torch warn of.
    command += ["-W", "default", "-p", "no:cacheprovider", f"--confcutdir={TESTS}"]
    command += [f"--junitxml={report}", *options]
    if is_installed("pytest-xdist") and not part.dry:
        command += ["--numprocesses", "auto"]
    shown = subprocess.DEVNULL if quiet else None
    subprocess.run(command, cwd=ROOT, check=False, stdout=shown, timeout=max(1.0, part.left))
    return outcomes(report)


def outcomes(report: Path) -> dict[str, Any]:
    """The counts of a JUnit report, and the names of the tests that failed."""
    found: Counter[str] = Counter()
    names = []
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = next((tag for tag in ("error", "failure", "skipped") if tag in tags), "passed")
        found[outcome] += 1
        if outcome in ("error", "failure"):
            names.append(str(case.get("name")))
    return {**found, "failed": names[:MOST_NAMES]}


def caught(found: dict[str, Any]) -> dict[str, Any]:
    """Whether every test of served layers failed, as with the planted defect it must."""
    del found["failed"]
    return {**found, "caught": found.get("failure", 0) > 0 and not found.get("passed", 0)}


def chosen(part: Part, served: bool) -> Sequence[str]:
    """The tests to run; in a dry run one or two of them, under Triton's interpreter."""
    if served:
        kinds = " and float32 and poly" if part.dry else ""
        return str(TESTS / "test_triton_layers.py"), "-k", SERVED + kinds
    if part.dry:
        return str(TESTS / "test_triton_rank_space.py"), "-k", "zero"
    return (str(TESTS),)


def measure(part: Part) -> None:
    """The part."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        part.try_to("tests", lambda: run_tests(part, report, *chosen(part, served=False)), 1)
        planted = ("-p", "bench.gpu.planted_defect", *chosen(part, served=True))
        run = partial(run_tests, part, report, *planted, quiet=True)
        part.try_to("planted defect", lambda: caught(run()), 1)


if __name__ == "__main__":
    run_as_part("tests", __doc__, measure)
