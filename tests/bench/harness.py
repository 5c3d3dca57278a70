"""What every benchmark shares: turns and their ratios, the machine, the command line, the result.

A machine's speed drifts while a benchmark runs. So contenders take turns, and a figure is compared
only with its neighbours: the nearest turns, before and after, of what it is compared with.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

import psutil
import torch

from polyrex.training.records import write_record

P = ParamSpec("P")


class Comparison(NamedTuple):
    """How many times as large one figure is as another: median and quartiles over all turns."""

    ratio: float
    quartiles: tuple[float, float]


@dataclass
class Turns:
    """The figures that contenders gave in turn: name -> number of the turn -> figure."""

    figures: dict[str, dict[int, float]] = field(default_factory=dict)
    turn: int = 0

    def rounds(self, count: int, warm_up: int = 1) -> Iterator[Turns]:
        """Yield, for each round, where its figures go: those of the warm-up rounds are dropped."""
        for _ in range(warm_up):
            yield Turns()
        for _ in range(count):
            yield self

    def add(self, name: str, figure: float) -> None:
        """Take the next turn."""
        self.figures.setdefault(name, {})[self.turn] = figure
        self.turn += 1

    def ratios(self, over: str, under: str) -> list[float]:
        """Each figure of `over`, divided by the mean of the nearest figures of `under`."""

        def near(turn: int) -> float:
            known = self.figures[under]
            before = max((t for t in known if t < turn), default=None)
            after = min((t for t in known if t > turn), default=None)
            return statistics.mean(known[t] for t in (before, after) if t is not None)

        return [figure / near(turn) for turn, figure in self.figures[over].items()]

    def compare(self, over: str, under: str) -> Comparison:
        """The median and the quartiles of `ratios`."""
        found = self.ratios(over, under)
        quartiles = statistics.quantiles(found, method="inclusive") if len(found) > 1 else found * 3
        low, ratio, high = (round(value, 3) for value in quartiles)
        return Comparison(ratio, (low, high))

    def medians(self, digits: int = 1) -> dict[str, float]:
        """The median figure of each name."""
        return {
            name: round(statistics.median(figures.values()), digits)
            for name, figures in self.figures.items()
        }


def seconds_of(call: Callable[P, object], *arguments: P.args, **named: P.kwargs) -> float:
    """Call once; the seconds that it took."""
    started = time.perf_counter()
    call(*arguments, **named)
    return time.perf_counter() - started


def machine() -> dict[str, Any]:
    """The machine that the figures were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def command_line(
    description: str | None,
    *,
    rounds: int | None = None,
    out: str = "also write the JSON document to this file, indented",
) -> argparse.ArgumentParser:
    """A parser with `--out`, and with `--rounds` where a default is given."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help=out)
    return parser


def report(
    document: dict[str, Any], out: Path | None, last_line: dict[str, Any] | None = None
) -> None:
    """Write the document to `out`; print it, or what `last_line` keeps of it, as one line."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_record(out, document)
    print(json.dumps(last_line or document))


def without(document: dict[str, Any], key: str) -> dict[str, Any]:
    """The document without one of its keys."""
    return {name: value for name, value in document.items() if name != key}
