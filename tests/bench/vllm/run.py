"""`make bench-vllm`: polyrex on vLLM, vLLM's own multi-LoRA, and vLLM with LoRA off, side by side.

All engines of one mode (eager, then compiled) are started first and keep running. Round after round
they answer, in turn, requests of the same lengths and tasks; the engine that others are compared
with takes turns between them again and again. A ratio is of one turn over the nearest turns, before
and after, of what it is compared with; its median is reported with its quartiles. Batches that take
minutes, or that no goal is set for, are sent in every fourth round. Every prompt is new, so that a
prefix cache helps nobody. The last line is one JSON document.

The benchmark has independent parts and takes more than an hour. With `--out`, the results of a part
are written as soon as it ends; `--parts` measures some parts again and keeps the results of the
others.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.cases import MAIN, OTHERS, REQUESTS
from bench.harness import Comparison, Turns, command_line, machine, report
from bench.kernels.layers import layers_8b
from bench.server_process import many, register, server_process
from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.model.base_model import DEFAULT_BASE, resolve_base
from polyrex.kernels.routing import RoutingTable
from support.random_inventory import make_inventory

from .engines import Plain, Polyrex, Starter, started, write_loras
from .report import read_document, write_report
from .rounds import (
    DECODE,
    PREFILL,
    Batch,
    decode_round,
    flat_round,
    prefill_round,
    rare_round,
    take_turns,
)


@dataclass(frozen=True)
class Part:
    """The results of one part of the benchmark."""

    ratios: dict[str, float]  # those with a goal
    figures: dict[str, Any]

    @classmethod
    def of(cls, found: dict[str, Comparison], figures: dict[str, Any]) -> Part:
        """A part with these comparisons; their quartiles go to the figures."""
        quartiles = {name: list(each.quartiles) for name, each in found.items()}
        return cls(
            {name: each.ratio for name, each in found.items()}, figures | {"quartiles": quartiles}
        )


@dataclass(frozen=True)
class Bench:
    """What the parts share."""

    model: str
    rounds: int
    loras: Path  # for vLLM
    inventories: dict[str, Inventory]

    @classmethod
    def prepare(cls, folder: Path, rounds: int) -> Bench:
        """Write random LoRAs and inventories for the default base model to `folder`."""
        model = resolve_base(DEFAULT_BASE)
        loras = folder / "loras"
        write_loras(model, loras, REQUESTS)
        inventories = {  # so little opened that the base model's text stays readable
            name: make_inventory(
                folder / f"{name}.safetensors", model, spec, spread=1e-2, dtype=torch.bfloat16
            )
            for name, spec in (MAIN | OTHERS).items()
        }
        return cls(model, rounds, loras, inventories)

    async def mode(self, eager: bool) -> Part:
        """Decode and prefill of all engines in one mode; fewer methods where engines compile."""
        names = MAIN if eager else ("tensorpoly-1",)
        engines: dict[str, Starter] = {
            "base": partial(Plain.start, self.model, eager),
            "multilora": partial(Plain.start, self.model, eager, self.loras),
            **{name: self.polyrex(name, eager) for name in names},
        }
        decode, prefill = Turns(), Turns()
        async with started(engines) as running:
            added = [await running["multilora"].add(task) for task in range(REQUESTS)]
            often, rarely = decode_round(running), rare_round(running)
            await take_turns(Turns(), DECODE, often + rarely)  # warms up
            for number in range(self.rounds):
                if number % 4 == 0:
                    await take_turns(decode, DECODE, rarely)
                await take_turns(decode, DECODE, often)
            for _ in range(max(1, self.rounds // 2)):
                await take_turns(prefill, PREFILL, prefill_round(running))
            slow = Batch("multilora distinct", running["multilora"], "distinct", REQUESTS)
            await take_turns(prefill, PREFILL, [slow])  # minutes
        figures = {"decode": decode.medians(), "prefill": prefill.medians()}
        found = comparisons(decode, prefill, names)
        if not eager:
            return Part.of({f"{key}_compiled": each for key, each in found.items()}, figures)
        one_task = {name: decode.compare(f"{name} identical", "base") for name in MAIN}
        figures["one_task"] = {name: each.ratio for name, each in one_task.items()}
        figures["add_lora_ms_p50"] = round(1e3 * statistics.median(added), 1)
        return Part.of(found, figures)

    async def flat(self) -> Part:
        """What should cost nothing; ratios near 1 need twice the rounds."""
        engines = {"base": partial(Plain.start, self.model, True)}
        ours = {"tensorpoly-1": self.polyrex("tensorpoly-1", True)}
        turns = Turns()
        async with started(engines | ours) as running:
            for into in turns.rounds(2 * self.rounds):
                await take_turns(into, DECODE, flat_round(running))
        few = "tensorpoly-1 uniform of 32"
        grown = {
            f"tasks{tasks}_vs_tasks32": turns.compare(f"tensorpoly-1 uniform of {tasks}", few)
            for tasks in (1_000, 10_000)
        }
        found = {"idle_vs_base": turns.compare("idle", "base")} | grown
        return Part.of(found, {"decode": turns.medians()})

    def polyrex(self, name: str, eager: bool) -> Starter:
        """Starts polyrex with the inventory of a method."""
        return partial(Polyrex.start, self.model, eager, self.inventories[name])

    async def one_task(self) -> Part:
        """Every other method with one task for all requests, compared with the base model."""
        found = {}
        async with started({"base": partial(Plain.start, self.model, True)}) as running:
            for name in OTHERS:
                async with started({name: self.polyrex(name, True)}) as own:
                    base = Batch("base", running["base"])
                    ours = Batch(name, own[name], "identical", 1)
                    turns = Turns()
                    for into in turns.rounds(self.rounds):
                        await take_turns(into, DECODE, [base, ours])
                    found[name] = turns.compare(name, "base").ratio
        return Part({}, found)

    async def registration(self) -> Part:
        """The cost of one task among 10,000: the time to register it, and its device memory."""
        inventory = self.inventories["tensorpoly-1"]
        seconds = await asyncio.to_thread(registration_seconds, inventory, 10_000)
        found = {
            "register_ms_p50_10000_tasks": round(1e3 * seconds, 2),
            "device_bytes_per_task": round(table_bytes(inventory, 10_000)),
        }
        return Part(found, {})

    async def layers(self) -> Part:
        """Single layers with the shapes of an 8B model."""
        figures = await asyncio.to_thread(layers_8b)
        return Part({"layer8b_overhead_distinct32": figures["overhead_distinct32"]}, figures)


PARTS: dict[str, Callable[[Bench], Awaitable[Part]]] = {
    "eager": partial(Bench.mode, eager=True),
    "flat": Bench.flat,
    "compiled": partial(Bench.mode, eager=False),
    "one_task": Bench.one_task,
    "registration": Bench.registration,
    "layers": Bench.layers,
}


def comparisons(decode: Turns, prefill: Turns, names: Iterable[str]) -> dict[str, Comparison]:
    """32 distinct tasks, compared with as many in vLLM's multi-LoRA and with LoRA off."""
    found = {}
    for other, turn in {"multilora": "multilora distinct", "base": "base"}.items():
        for name in names:
            found[f"{name}_vs_{other}_distinct32"] = decode.compare(f"{name} distinct", turn)
        found[f"prefill_vs_{other}_distinct32"] = prefill.compare("tensorpoly-1 distinct", turn)
    return found


def registration_seconds(inventory: Inventory, tasks: int) -> float:
    """The median time of 200 registrations over HTTP, with `tasks` tasks registered before."""
    options = ("--engine", "vllm", "--eager", "--dtype", "bfloat16")
    with server_process(inventory.path, *options) as (client, _):
        return statistics.median(register(client, inventory, many(tasks + 200))[-200:])


def table_bytes(inventory: Inventory, tasks: int) -> float:
    """The bytes that each of so many tasks takes of the routing table."""
    table = RoutingTable(1 + tasks, *inventory.table_shape, torch.device("cpu"), torch.bfloat16)
    return table.weights.nbytes / (1 + tasks)


def merged(document: dict[str, Any], name: str, part: Part) -> dict[str, Any]:
    """The document with the results of a part, instead of its earlier ones."""
    ratios = document["ratios"] | part.ratios
    figures = document["figures"] | {name: part.figures, "machine": machine()}
    if {"eager", "one_task"} <= figures.keys():
        every = figures["eager"]["one_task"] | figures["one_task"]
        ratios["one_task_vs_base_min"] = min(every.values())
    return {"ratios": ratios, "figures": figures}


async def run_parts(names: Sequence[str], rounds: int, out: Path | None) -> dict[str, Any]:
    """Run these parts; returns the whole document, and keeps the folder `out` up to date."""
    document: dict[str, Any] = {"ratios": {}, "figures": {}}
    if out and set(names) != set(PARTS):
        document = read_document(out)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench.prepare(Path(folder), rounds)
        for name in names:
            document = merged(document, name, await PARTS[name](bench))
            if out:
                write_report(document, out)
    return document


def main() -> None:
    """The command behind `make bench-vllm`."""
    parser = command_line(__doc__, rounds=16, out="folder for the JSON document, table and plot")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    report(asyncio.run(run_parts(options.parts, options.rounds, options.out)), None)


if __name__ == "__main__":
    main()
