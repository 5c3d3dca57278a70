"""The tables of what a GPU gave, from the parts' JSON files.

python -m bench.gpu.table --out tests/results/gpu
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.gpu import predict
from bench.gpu.__main__ import PARTS

FIGURES = {
    "tests": ("passed", "failure", "error", "skipped", "caught", "failed"),
    "training": (
        "rows_per_second",
        "of_peft_poly",
        "of_peft_lora",
        "peak_gb",
        "kernels",
        "launches",
        "device_ms",
    ),
    "study": ("steps", "first_loss", "last_loss", "tokens_per_second"),
}
"""The columns of a part's table: the figures that most of its entries have."""
METHODS = ("tensorpoly-1", "tensorpoly-2", "trex-static")
LORAS = ("lora_gathered_us", "lora_vllm_us", "lora_one_for_all_us")


def rows_of(part: str, figures: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """The heading of a part's table, and then its rows."""
    figures = {key: figures[key] for key in sorted(figures, key=by_number)}
    if part == "kernels":
        yield from kernel_rows(figures)
    elif part == "engine":
        yield from engine_rows(figures)
    else:
        if part == "training":
            figures |= {
                f"{name}, median": each for name, each in figures.get("compared", {}).items()
            }
        columns = FIGURES[part]
        yield "", list(columns)
        for key, found in figures.items():
            if any(column in found for column in columns):
                yield key, [found.get(column, "") for column in columns]


def by_number(key: str) -> list[tuple[bool, int, str]]:
    """Sorts names with numbers in them as people would: 32 before 1,024."""
    parts = re.findall(r"\d+|\D+", key)
    return [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]


def kernel_rows(figures: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Microseconds of each layer, with the share of the roofline in brackets."""
    kinds = "layer", "alone"
    yield "", ["frozen", *(f"{m}: {kind}" for kind in kinds for m in METHODS), *LORAS]
    for key, found in figures.items():
        if "frozen_us" in found:
            cells = [_share(found["frozen_us"], found["frozen_of_roofline"])]
            for kind in kinds:
                for method in METHODS:
                    own = found[method]
                    cells.append(_share(own[f"{kind}_us"], own[f"{kind}_of_roofline"]))
            yield key, [*cells, *(found.get(name, "") for name in LORAS)]


def _share(time: float, share: float) -> str:
    return f"{time} ({share})"


def engine_rows(figures: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Tokens a second by the number of distinct tasks, ratios, and what a step does."""
    yield "", ["tokens/s by tasks", "of no adapters by tasks", "kernels", "launches", "device ms"]
    for key, found in figures.items():
        if "tokens_per_second" in found:
            rates = ", ".join(f"{n}: {rate}" for n, rate in found["tokens_per_second"].items())
            ratios = [f"{n.split()[0]}: {r}" for n, r in found.items() if n.endswith("of base")]
            yield key, [rates, ", ".join(ratios), "", "", ""]
        elif "device_ms" in found:
            yield key, ["", "", found["kernels"], found["launches"], found["device_ms"]]
    yield from lora_rows(figures)


def lora_rows(figures: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Every method's tokens a second over those of LoRAs in PyTorch, with as many tasks."""
    for key, found in figures.items():
        name, _, requests = key.partition(", ")
        tasks = requests.split()[0] if requests.endswith(" requests") else ""
        if name != "lora in PyTorch" or tasks not in found["tokens_per_second"]:
            continue
        for method in METHODS:
            own = figures.get(f"{method}, graphs on, {requests}", {})
            if tasks in own.get("tokens_per_second", {}):
                rate = own["tokens_per_second"][tasks] / found["tokens_per_second"][tasks]
                yield f"{method}, of lora in PyTorch, {requests}", [f"{rate:.2f}", "", "", "", ""]


def section(document: dict[str, Any]) -> str:
    """A part's heading, machine, table, and what is missing from it."""
    machine = document["machine"]
    about = ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)
    state = f"{document['seconds']} s" + ("" if document["finished"] else ", cut short")
    lines = [f"## {document['part']}", "", f"{about}; {state}.", ""]
    if document["dry_run"]:
        lines += ["A dry run on the CPU: the figures mean nothing.", ""]
    rows = list(rows_of(document["part"], document["figures"]))
    for number, (key, cells) in enumerate(rows):
        lines.append(f"| {' | '.join([key, *map(_cell, cells)])} |")
        if number == 0:
            lines.append("|---" * (len(cells) + 1) + "|")
    for key, reason in document["left_out"].items():
        lines += ["", f"- {key}: left out: {reason}"]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def page(folder: Path) -> str:
    """README.md of a folder of results."""
    paths = [folder / f"{part}.json" for part in PARTS]
    sections = [section(json.loads(path.read_text())) for path in paths if path.exists()]
    head = "# On a GPU\n\nWritten by `make gpu`; docs/gpu.md says what the parts measure."
    predicted = "## What the roofline predicts\n\n" + predict.table()
    return "\n\n".join([head, *sections, predicted]) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(page(out))


if __name__ == "__main__":
    main()
