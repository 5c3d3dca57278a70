"""Compressed LoRAs on polyrex, beside the originals on vLLM's own multi-LoRA.

The last step of `make bench-compress`. 32 requests at once of 32 different tasks, in turns; a
ratio is of one turn over the nearest turns of what it is compared with. The last line is one JSON
document: what compressing reported, what the tasks then score, and the throughputs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from bench.serving import machine
from polyrex.adapters.files.inventory import Inventory, read_inventory
from polyrex.adapters.files.registry import TaskInfo, TaskVersion
from polyrex.adapters.files.router import read_router
from polyrex.adapters.model.base_model import DEFAULT_BASE, resolve_base
from polyrex.adapters.peft.lora import CONFIG

from .engines import IN_FLIGHT, Plain, Polyrex
from .meter import DECODE, Meter, Turn
from .run import Starter, started

BASE, THEIRS, OURS = "base", "multilora", "compressed"


def read_version(inventory: Inventory, names: list[str], number: int) -> TaskVersion:
    """The task of a number, from the router beside its inventory."""
    path = inventory.path.parent / "routers" / f"{names[number]}.safetensors"
    data = path.read_bytes()
    router = read_router(data, str(path), inventory)
    info = TaskInfo(names[number], 1, router.sha256, len(data), 0.0, "", {}, {})
    return TaskVersion(info, router)


def linked(loras: Path, names: list[str], folder: Path) -> Path:
    """The LoRAs of the first tasks under the names that the benchmark's engine asks for."""
    for number, name in enumerate(names[:IN_FLIGHT]):
        (folder / f"t{number}").symlink_to((loras / name).resolve())
    return folder


async def measure(loras: Path, compressed: Path, rounds: int) -> dict[str, Any]:
    """Medians in tokens a second, and ratios with their quartiles."""
    inventory = read_inventory(compressed / "inventory.safetensors")
    names = sorted(path.stem for path in (compressed / "routers").glob("*.safetensors"))
    version = cache(partial(read_version, inventory, names))
    model, meter = resolve_base(DEFAULT_BASE), Meter()
    with tempfile.TemporaryDirectory() as folder:
        originals = linked(loras, names, Path(folder))
        configs = [json.loads((loras / name / CONFIG).read_text()) for name in names]
        rank = max(config["r"] for config in configs)
        engines: dict[str, Starter] = {
            BASE: partial(Plain.start, model, True),
            THEIRS: partial(Plain.start, model, True, originals, rank),
            OURS: partial(Polyrex.start, model, True, inventory, version),
        }
        async with started(engines) as running:
            for task in range(IN_FLIGHT):
                await running[THEIRS].add(task)
            turns: list[Turn] = [
                (BASE, running[BASE], "none", 0),
                (OURS, running[OURS], "distinct", IN_FLIGHT),
                (THEIRS, running[THEIRS], "distinct", IN_FLIGHT),
            ]
            await Meter().round(DECODE, turns)
            for _ in range(rounds):
                await meter.round(DECODE, turns)
    compared = {f"{OURS}_vs_{other}": meter.compare(OURS, other) for other in (THEIRS, BASE)}
    return {
        **{name: each.ratio for name, each in compared.items()},
        "quartiles": {name: list(each.quartiles) for name, each in compared.items()},
        "tokens_per_second": meter.medians(),
        "rounds": rounds,
    }


def document(compressed: Sequence[Path], throughput: dict[str, Any]) -> dict[str, Any]:
    """What `compress` and `compressed_scores` left in each folder, without the single tasks but for
    the one that is served, and the throughputs of that."""
    found = [
        [json.loads((folder / f"{name}.json").read_text()) for name in ("report", "scores")]
        for folder in compressed
    ]
    ranks = {
        str(report["rank"]): {key: each for key, each in report.items() if key != "by_task"}
        | {"scores": {key: each for key, each in scores.items() if key != "by_lora"}}
        for report, scores in found
    }
    report, scores = found[0]
    tasks = {name: each | scores["by_lora"][name] for name, each in report["by_task"].items()}
    served = {"rank": report["rank"], "by_task": tasks}
    return {"ranks": ranks, "served": served | throughput, "machine": machine()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loras", type=Path, required=True, help="the originals")
    parser.add_argument(
        "--compressed",
        type=Path,
        nargs="+",
        required=True,
        help="what compress wrote; the first is served",
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    found = asyncio.run(measure(options.loras, options.compressed[0], options.rounds))
    result = document(options.compressed, found)
    options.out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    del result["served"]["by_task"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
