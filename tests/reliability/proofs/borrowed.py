"""Proofs that are tests or a benchmark already: they run in a process, and their results count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from polyrex.server.http.access import ACCESS
from reliability.result import Result

TESTS = Path(__file__).parents[2]

_PLANT_PREFIX = """
import time
from bench.cache import prefix
from polyrex.server.engines.embedded.prefix_cache import PrefixCache
PrefixCache.adopt = lambda *_: None
PrefixCache.remember = lambda *_: time.sleep(0.002)
prefix.main()
"""


def access(folder: Path, *, plugins: Sequence[str] = ()) -> Result:
    """Every route, with every role, in every form of path and Host."""
    path = "server/http/access/test_access.py"
    goal = "routes x roles x forms of path and Host as declared"
    return run_tests(folder, goal, [path], plugins, {"routes": len(ACCESS)})


def ray(folder: Path, *, plugins: Sequence[str] = ()) -> Result:
    """One replica is killed under Ray Serve."""
    arguments = ["server/test_ray_app.py", "-k", "killed_replica"]
    return run_tests(folder, "one of two replicas killed under Ray Serve", arguments, plugins, {})


def run_tests(
    folder: Path,
    goal: str,
    arguments: Sequence[str],
    plugins: Sequence[str],
    figures: dict[str, float],
) -> Result:
    """Run tests with plugins, which plant a defect; `figures` go into the result."""
    report = folder / "junit.xml"
    command = [sys.executable, "-m", "pytest", "--quiet", "--no-header", f"--junitxml={report}"]
    command += [part for plugin in plugins for part in ("-p", plugin)]
    done = subprocess.run(
        [*command, *arguments], cwd=TESTS, env=_environment(), capture_output=True, text=True
    )
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None, done.stdout
    failed = [
        case.attrib["name"] for case in suite.iter("testcase") if case.find("failure") is not None
    ]
    ran = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    return Result(
        goal=goal,
        length=f"{ran['tests']} tests",
        figures={**figures, **ran},
        at_most={"failures": 0, "errors": 0, "skipped": 0},
        at_least={"tests": 1},
        remarks=[] if done.returncode == 0 else done.stdout.splitlines()[-10:],
        failed_tests=failed,
    )


def prefix_cache(folder: Path, *, useless: bool = False) -> Result:
    """What `make bench-prefix` measures.

    `useless`: a planted defect, a cache that takes its time and finds nothing.
    """
    out = folder / "prefix.json"
    started = ["-c", _PLANT_PREFIX, "--rounds", "1"] if useless else ["-m", "bench.cache.prefix"]
    command = [sys.executable, *started, "--out", str(out)]
    subprocess.run(command, cwd=TESTS, env=_environment(), check=True)
    found = json.loads(out.read_text())
    ratios: dict[str, float] = found["ratios"]
    figures = {f"{name}, with the cache over without": ratio for name, ratio in ratios.items()}
    *times, throughput = figures  # the last one shares nothing
    return Result(
        goal="the prefix cache of the embedded engine",
        length=f"{found['rounds']} rounds of every comparison",
        figures=figures,
        at_most=dict.fromkeys(times, found["most_time"]),
        at_least={throughput: found["figures"]["unlike_prompts"]["noise"][0]},
    )


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path}
