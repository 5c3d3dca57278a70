"""Compressed LoRAs on polyrex, compared with the originals on vLLM's own multi-LoRA.

The last step of `make bench-compress`. Each engine in turn answers 32 requests of 32 different
tasks; a ratio is of one turn over the nearest turns of what it is compared with. The last line is
one JSON document: the report of the compression, the scores of the tasks, and the throughputs.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from bench.cases import REQUESTS
from bench.harness import Turns, command_line, machine, report, without
from polyrex.adapters.files.bundle import Bundle
from polyrex.adapters.model.base_model import DEFAULT_BASE, resolve_base
from polyrex.adapters.peft.lora_checkpoint import CONFIG

from .engines import Plain, Polyrex, Starter, started
from .rounds import DECODE, Batch, take_turns

BASE, THEIRS, OURS = "base", "multilora", "compressed"


def linked(loras: Path, names: list[str], folder: Path) -> Path:
    """Links to the LoRAs of the first tasks, under the names that `Plain` expects."""
    for number, name in enumerate(names[:REQUESTS]):
        (folder / f"t{number}").symlink_to((loras / name).resolve())
    return folder


async def throughput(loras: Path, compressed: Path, rounds: int) -> dict[str, Any]:
    """Median tokens a second, and ratios with their quartiles."""
    bundle = Bundle.read(compressed)
    names = bundle.tasks
    version = cache(lambda number: bundle.task(names[number]))
    model, turns = resolve_base(DEFAULT_BASE), Turns()
    with tempfile.TemporaryDirectory() as folder:
        originals = linked(loras, names, Path(folder))
        configs = [json.loads((loras / name / CONFIG).read_text()) for name in names]
        rank = max(config["r"] for config in configs)
        engines: dict[str, Starter] = {
            BASE: partial(Plain.start, model, True),
            THEIRS: partial(Plain.start, model, True, originals, rank),
            OURS: partial(Polyrex.start, model, True, bundle.inventory, version),
        }
        async with started(engines) as running:
            for task in range(REQUESTS):
                await running[THEIRS].add(task)
            batches = [
                Batch(BASE, running[BASE]),
                Batch(OURS, running[OURS], "distinct", REQUESTS),
                Batch(THEIRS, running[THEIRS], "distinct", REQUESTS),
            ]
            for into in turns.rounds(rounds):
                await take_turns(into, DECODE, batches)
    compared = {f"{OURS}_vs_{other}": turns.compare(OURS, other) for other in (THEIRS, BASE)}
    return {
        **{name: each.ratio for name, each in compared.items()},
        "quartiles": {name: list(each.quartiles) for name, each in compared.items()},
        "tokens_per_second": turns.medians(),
        "rounds": rounds,
    }


def document(compressed: Sequence[Path], found: dict[str, Any]) -> dict[str, Any]:
    """The report and the scores in each folder, and the throughputs `found` for the first one.

    Single tasks are kept of the first folder only, which is the one that is served.
    """
    written = [
        [json.loads((folder / f"{name}.json").read_text()) for name in ("report", "scores")]
        for folder in compressed
    ]
    ranks = {
        str(compression["rank"]): without(compression, "by_task")
        | {"scores": without(scores, "by_lora")}
        for compression, scores in written
    }
    compression, scores = written[0]
    tasks = {name: each | scores["by_lora"][name] for name, each in compression["by_task"].items()}
    served = {"rank": compression["rank"], "by_task": tasks}
    return {"ranks": ranks, "served": served | found, "machine": machine()}


def main() -> None:
    """The last step of `make bench-compress`."""
    parser = command_line(__doc__, rounds=8)
    parser.add_argument("--loras", type=Path, required=True, help="the originals")
    parser.add_argument(
        "--compressed",
        type=Path,
        nargs="+",
        required=True,
        help="folders of `polyrex compress`; the first is served",
    )
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    found = asyncio.run(throughput(options.loras, options.compressed[0], options.rounds))
    result = document(options.compressed, found)
    last_line = result | {"served": without(result["served"], "by_task")}
    report(result, options.out, last_line)


if __name__ == "__main__":
    main()
