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

from bench.gpu import measured, predict
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
GOALS = """\
Every figure that has a goal: what the roofline predicted, and what was measured; `-` where nothing
was yet. Ratios of the engine are those of decode steps, unless they say that they are end to end.
"""
METHODS = ("tensorpoly-1", "tensorpoly-2", "trex-static")
A_STEP = ("kernels", "launches", "device_ms", "peak_gb")
"""What the device does in one step of an engine, and the memory of all."""
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
            loras = figures.get(key + measured.LORAS, {})
            yield key, [*cells, *(loras.get(name, "") for name in LORAS)]


def _share(time: float, share: float) -> str:
    return f"{time} ({share})"


def engine_rows(figures: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Rates and times by the number of distinct tasks, ratios, and what a step does."""
    columns = ["tokens/s by tasks", "ms a step by tasks", "of no adapters by tasks"]
    yield "", [*columns, *(column.replace("_", " ") for column in A_STEP)]
    for key, found in figures.items():
        if "tokens_per_second" in found:
            tasks = [name.split()[0] for name in found if name.endswith("of base")]
            ratios = {n: found[measured.of_base(int(n))] for n in tasks}
            cells = found["tokens_per_second"], found.get("ms_a_step", {}), ratios
            yield key, [*map(_by_tasks, cells), *[""] * len(A_STEP)]
        elif any(column in found for column in A_STEP):
            yield key, [*[""] * len(columns), *(found.get(column, "") for column in A_STEP)]


def _by_tasks(found: dict[str, float]) -> str:
    return ", ".join(f"{tasks}: {found[tasks]}" for tasks in sorted(found, key=int))


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
    documents = [json.loads(path.read_text()) for path in paths if path.exists()]
    head = "# On a GPU\n\nWritten by `make gpu`; docs/gpu.md says what the parts measure."
    results = {each["part"]: each["figures"] for each in documents if not each["dry_run"]}
    goals = f"## Goals\n\n{GOALS}\n{predict.table(results)}"
    return "\n\n".join([head, goals, *map(section, documents)]) + "\n"


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
