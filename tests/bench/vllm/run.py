"""`make bench-vllm`: vLLM with LoRA off, vLLM's own multi-LoRA, and polyrex on vLLM, side by side.

All engines of one mode (eager, then compiled) are started first and stay; then they answer
requests of the same lengths and tasks in turn, round after round, the one that others are compared
with again and again between them. A ratio is of one turn over the nearest turns, before and after,
of what it is compared with; the median is reported, with the quartiles. What takes minutes, or no
goal is set for, is measured in every fourth round. Every prompt is new, so that no prefix cache
helps anybody. The last line is one JSON document.

The benchmark has parts that need nothing of each other, and takes more than an hour. With `--out`,
what a part gave is written down as soon as it ends; `--parts` measures some of them anew and leaves
the others as they are.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import statistics
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.kernels.layers import layers_8b
from bench.serving import growth, machine, register, server_process
from polyrex.adapters.files.inventory import Inventory, read_inventory, write_inventory
from polyrex.adapters.model.attach import attach, find_targets
from polyrex.adapters.model.base_model import DEFAULT_BASE, load_base, resolve_base
from polyrex.adapters.spec import AdapterSpec
from polyrex.kernels.routing import RoutingTable

from .adapters import RANK, write_adapters
from .engines import IN_FLIGHT, Plain, Polyrex
from .meter import DECODE, PREFILL, Comparison, Meter, Turn
from .report import read_document, write_report

MAIN = {
    "tensorpoly-1": AdapterSpec("tensorpoly-1", rank=RANK, experts=8),
    "tensorpoly-2": AdapterSpec("tensorpoly-2", rank=RANK, experts=8),
    "trex-static": AdapterSpec("trex", rank=RANK, form="static"),
}
OTHERS = {
    "lora": AdapterSpec("lora", rank=RANK),
    "tlora": AdapterSpec("tlora", rank=RANK),
    "poly": AdapterSpec("poly", rank=RANK, experts=8),
    "mhr": AdapterSpec("mhr", rank=RANK, experts=8, splits=4),
    "tensorpoly-x": AdapterSpec("tensorpoly-x", rank=RANK, experts=4),
    "trex-mix": AdapterSpec("trex", rank=8),
    "trex-diagonal": AdapterSpec("trex", rank=RANK, form="diagonal"),
    "molora": AdapterSpec("molora", rank=4, experts=8),
    "sira": AdapterSpec("sira", rank=4, experts=8),
}


def random_inventory(folder: Path, name: str, spec: AdapterSpec, model: str) -> Inventory:
    """An inventory of random experts, small enough to leave the base model's text readable."""
    base = load_base(model, torch.float32)
    adapted = attach(base, spec, find_targets(base))
    generator = torch.Generator().manual_seed(0)
    for layer in adapted.layers:
        for key, parameter in layer.experts.named_parameters():
            if key != "lora_a":  # drawn by attach
                nn.init.normal_(parameter, std=1e-2, generator=generator)
    path = folder / f"{name}.safetensors"
    write_inventory(path, adapted, dtype=torch.bfloat16)
    return read_inventory(path)


Starter = Callable[[], Awaitable[Any]]


@asynccontextmanager
async def started(engines: dict[str, Starter]) -> AsyncGenerator[dict[str, Any], None]:
    """Engines by name, from what starts each; stopped at the end, whatever happens."""
    running: dict[str, Any] = {}
    try:
        for name, start in engines.items():
            print(f"starting {name}", flush=True)
            running[name] = await start()
        yield running
    finally:
        for engine in running.values():
            await engine.stop()
        gc.collect()


def decode_turns(engines: dict[str, Any]) -> list[Turn]:
    """A round of the decode-heavy workload."""
    base: Turn = ("base", engines["base"], "none", 0)
    turns = [base]
    for name in MAIN:
        if name in engines:
            distinct, identical = (
                (f"{name} {popularity}", engines[name], popularity, IN_FLIGHT)
                for popularity in ("distinct", "identical")
            )
            turns += [distinct, base, identical, base]
    return turns


def rare_turns(engines: dict[str, Any]) -> list[Turn]:
    """What is measured in every fourth round of the decode-heavy workload."""
    theirs, ours = engines["multilora"], engines["tensorpoly-1"]
    turns: list[Turn] = [
        (f"multilora {popularity}", theirs, popularity, IN_FLIGHT)
        for popularity in ("identical", "uniform", "zipf", "distinct")
    ]
    turns.append(("tensorpoly-1 uniform of 1", ours, "uniform", 1))
    return turns + [
        (f"tensorpoly-1 zipf of {tasks}", ours, "zipf", tasks) for tasks in (32, 10_000)
    ]


def flat_turns(engines: dict[str, Any]) -> list[Turn]:
    """Decode-heavy: nothing adapted, and more and more tasks registered."""
    base, ours = engines["base"], engines["tensorpoly-1"]
    few, more, most = (
        (f"tensorpoly-1 uniform of {tasks}", ours, "uniform", tasks)
        for tasks in (32, 1_000, 10_000)
    )
    plain: Turn = ("base", base, "none", 0)
    return [plain, ("idle", ours, "none", 0), plain, few, more, few, most, few]


def prefill_turns(engines: dict[str, Any]) -> list[Turn]:
    """A round of the prefill-heavy workload."""
    base: Turn = ("base", engines["base"], "none", 0)
    distinct, identical = (
        (f"tensorpoly-1 {popularity}", engines["tensorpoly-1"], popularity, IN_FLIGHT)
        for popularity in ("distinct", "identical")
    )
    return [base, distinct, base, identical, base]


@dataclass(frozen=True)
class Part:
    """What one part of the benchmark gave."""

    ratios: dict[str, float]  # that goals are set for
    figures: dict[str, Any]

    @classmethod
    def of(cls, found: dict[str, Comparison], figures: dict[str, Any]) -> Part:
        """With the quartiles of comparisons among the figures."""
        quartiles = {name: list(each.quartiles) for name, each in found.items()}
        return cls(
            {name: each.ratio for name, each in found.items()}, figures | {"quartiles": quartiles}
        )


@dataclass(frozen=True)
class Bench:
    """What every part works with."""

    model: str
    rounds: int
    adapters: Path  # PEFT folders, for vLLM
    inventories: dict[str, Inventory]

    @classmethod
    def prepare(cls, folder: Path, rounds: int) -> Bench:
        """Write random adapters and inventories for the default base model into `folder`."""
        model = resolve_base(DEFAULT_BASE)
        adapters = folder / "adapters"
        write_adapters(Path(model), adapters, IN_FLIGHT)
        specs = (MAIN | OTHERS).items()
        found = {name: random_inventory(folder, name, spec, model) for name, spec in specs}
        return cls(model, rounds, adapters, found)

    async def mode(self, eager: bool) -> Part:
        """All engines in one mode; of the compiled ones, those that the comparison is about."""
        names = MAIN if eager else ("tensorpoly-1",)
        engines: dict[str, Starter] = {
            "base": partial(Plain.start, self.model, eager),
            "multilora": partial(Plain.start, self.model, eager, self.adapters),
            **{name: self.polyrex(name, eager) for name in names},
        }
        decode, prefill = Meter(), Meter()
        async with started(engines) as running:
            added = [await running["multilora"].add(task) for task in range(IN_FLIGHT)]
            often, rarely = decode_turns(running), rare_turns(running)
            await Meter().round(DECODE, often + rarely)
            for number in range(self.rounds):
                if number % 4 == 0:
                    await decode.round(DECODE, rarely)
                await decode.round(DECODE, often)
            for _ in range(self.rounds // 2):
                await prefill.round(PREFILL, prefill_turns(running))
            slow = [("multilora distinct", running["multilora"], "distinct", IN_FLIGHT)]
            await prefill.round(PREFILL, slow)  # minutes
        figures = {"decode": decode.medians(), "prefill": prefill.medians()}
        found = comparisons(decode, prefill, names)
        if not eager:
            return Part.of({f"{key}_compiled": each for key, each in found.items()}, figures)
        one_task = {name: decode.compare(f"{name} identical", "base") for name in MAIN}
        figures["one_task"] = {name: each.ratio for name, each in one_task.items()}
        figures["add_lora_ms_p50"] = round(1e3 * statistics.median(added), 1)
        return Part.of(found, figures)

    async def flat(self) -> Part:
        """What should change nothing: ratios near 1, which take twice the rounds to tell."""
        engines = {"base": partial(Plain.start, self.model, True)}
        ours = {"tensorpoly-1": self.polyrex("tensorpoly-1", True)}
        meter = Meter()
        async with started(engines | ours) as running:
            turns = flat_turns(running)
            await Meter().round(DECODE, turns)
            for _ in range(2 * self.rounds):
                await meter.round(DECODE, turns)
        few = "tensorpoly-1 uniform of 32"
        many = {
            f"tasks{tasks}_vs_tasks32": meter.compare(f"tensorpoly-1 uniform of {tasks}", few)
            for tasks in (1_000, 10_000)
        }
        found = {"idle_vs_base": meter.compare("idle", "base")} | many
        return Part.of(found, {"decode": meter.medians()})

    def polyrex(self, name: str, eager: bool) -> Starter:
        return partial(Polyrex.start, self.model, eager, self.inventories[name])

    async def one_task(self) -> Part:
        """Every other method, one task for all requests, over the base."""
        found = {}
        async with started({"base": partial(Plain.start, self.model, True)}) as running:
            for name in OTHERS:
                async with started({name: self.polyrex(name, True)}) as own:
                    meter = Meter()
                    base: Turn = ("base", running["base"], "none", 0)
                    turns = [base, (name, own[name], "identical", 1)]
                    for number in range(self.rounds + 1):
                        await (meter if number else Meter()).round(DECODE, turns)
                    found[name] = meter.compare(name, "base").ratio
        return Part({}, found)

    async def registration(self) -> Part:
        """What a task takes: to be registered where there are 10,000, and on the device."""
        inventory = self.inventories["tensorpoly-1"]
        seconds = await asyncio.to_thread(over_http, inventory, 10_000)
        found = {
            "register_ms_p50_10000_tasks": round(1e3 * seconds, 2),
            "device_bytes_per_task": round(table_bytes(inventory, 10_000)),
        }
        return Part(found, {})

    async def layers(self) -> Part:
        """Layers of an 8B model, without a model."""
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


def comparisons(decode: Meter, prefill: Meter, names: Iterable[str]) -> dict[str, Comparison]:
    """32 distinct tasks over vLLM's multi-LoRA with as many, and over vLLM with LoRA off."""
    found = {}
    for other, turn in {"multilora": "multilora distinct", "base": "base"}.items():
        for name in names:
            found[f"{name}_vs_{other}_distinct32"] = decode.compare(f"{name} distinct", turn)
        found[f"prefill_vs_{other}_distinct32"] = prefill.compare("tensorpoly-1 distinct", turn)
    return found


def over_http(inventory: Inventory, tasks: int) -> float:
    """Median seconds of a registration, to the last of 200, with `tasks` tasks registered."""
    options = ["--engine", "vllm", "--eager", "--dtype", "bfloat16"]
    with (
        tempfile.TemporaryDirectory() as folder,
        server_process(inventory.path, Path(folder), *options) as (client, process),
    ):
        growth(client, process, inventory, tasks)
        return statistics.median(register(client, inventory, {f"n-{n}": n for n in range(200)}))


def table_bytes(inventory: Inventory, tasks: int) -> float:
    """What the routing table takes on the device for each of so many tasks."""
    table = RoutingTable(1 + tasks, *inventory.table_shape, torch.device("cpu"), torch.bfloat16)
    return table.weights.nbytes / (1 + tasks)


def merged(document: dict[str, Any], name: str, part: Part) -> dict[str, Any]:
    """The document with what a part gave, in place of what it gave before."""
    ratios = document["ratios"] | part.ratios
    figures = document["figures"] | {name: part.figures, "machine": machine()}
    if {"eager", "one_task"} <= figures.keys():
        every = figures["eager"]["one_task"] | figures["one_task"]
        ratios["one_task_vs_base_min"] = min(every.values())
    return {"ratios": ratios, "figures": figures}


async def measure(names: Sequence[str], rounds: int, out: Path | None) -> dict[str, Any]:
    """Measure these parts; the whole document, which is kept in `out` meanwhile."""
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
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--out", type=Path, help="folder for the JSON document, table and plot")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    print(json.dumps(asyncio.run(measure(options.parts, options.rounds, options.out))))


if __name__ == "__main__":
    main()
