"""`make bench-vllm`: vLLM with LoRA off, vLLM's own multi-LoRA, and polyrex on vLLM, side by side.

All engines of one mode (eager, then compiled) are started first and stay; then they answer
requests of the same lengths and tasks in turn, round after round, the one that others are compared
with again and again between them. A ratio is of one turn over the nearest turns, before and after,
of what it is compared with; the median is reported. Every prompt is new, so that no prefix cache
helps anybody. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import statistics
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyrex.adapters.attach import attach, find_targets
from polyrex.adapters.base_model import DEFAULT_BASE, load_base, resolve_base
from polyrex.adapters.inventory import Inventory, read_inventory, write_inventory
from polyrex.adapters.spec import AdapterSpec
from polyrex.kernels.layer_bench import layers_8b
from polyrex.kernels.routing import RoutingTable
from polyrex.server.bench import growth, machine, register, server_process

from .vllm_bench_adapters import RANK, write_adapters
from .vllm_bench_engines import IN_FLIGHT, Plain, Polyrex
from .vllm_bench_meter import DECODE, PREFILL, Meter, Turn
from .vllm_bench_report import write_report

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
    ours = engines["tensorpoly-1"]

    def theirs(popularity: str) -> Turn:
        return f"multilora {popularity}", engines["multilora"], popularity, IN_FLIGHT

    def many(tasks: int) -> Turn:
        return f"tensorpoly-1 uniform of {tasks}", ours, "uniform", tasks

    def zipf(tasks: int) -> Turn:
        return f"tensorpoly-1 zipf of {tasks}", ours, "zipf", tasks

    turns = [theirs("identical"), theirs("uniform"), theirs("zipf")]
    for name in MAIN:
        if name in engines:
            distinct, identical = (
                (f"{name} {popularity}", engines[name], popularity, IN_FLIGHT)
                for popularity in ("distinct", "identical")
            )
            turns += [theirs("distinct"), base, distinct, base, identical, base]
    turns += [("idle", ours, "none", 0), base]
    turns += [many(1_000), many(32), many(10_000), many(32), many(1)]
    return [*turns, *(zipf(tasks) for tasks in (32, 10_000))]


def prefill_turns(engines: dict[str, Any]) -> list[Turn]:
    """A round of the prefill-heavy workload."""
    base: Turn = ("base", engines["base"], "none", 0)
    distinct, identical = (
        (f"tensorpoly-1 {popularity}", engines["tensorpoly-1"], popularity, IN_FLIGHT)
        for popularity in ("distinct", "identical")
    )
    return [base, distinct, base, identical, base]


@dataclass(frozen=True)
class Meters:
    """What one mode gave."""

    decode: Meter
    prefill: Meter
    add_lora: float  # vLLM's, median, in seconds


async def compare(
    model: str, inventories: dict[str, Inventory], adapters: Path, eager: bool, rounds: int
) -> Meters:
    """Measure one mode."""
    names = MAIN if eager else ("tensorpoly-1",)
    engines: dict[str, Starter] = {
        "base": partial(Plain.start, model, eager),
        "multilora": partial(Plain.start, model, eager, adapters),
        **{name: partial(Polyrex.start, model, eager, inventories[name]) for name in names},
    }
    decode, prefill = Meter(), Meter()
    async with started(engines) as running:
        added = [await running["multilora"].add(task) for task in range(IN_FLIGHT)]
        turns = decode_turns(running)
        warm_up = Meter()
        await warm_up.round(DECODE, turns)
        for _ in range(rounds):
            await decode.round(DECODE, turns)
        for _ in range(2):
            await prefill.round(PREFILL, prefill_turns(running))
        slow = [("multilora distinct", running["multilora"], "distinct", IN_FLIGHT)]
        await prefill.round(PREFILL, slow)  # minutes
    return Meters(decode, prefill, statistics.median(added))


async def one_task(model: str, inventories: dict[str, Inventory], rounds: int) -> dict[str, float]:
    """Every other method, one task for all requests, over the base."""
    found = {}
    async with started({"base": partial(Plain.start, model, True)}) as running:
        for name in OTHERS:
            start = partial(Polyrex.start, model, True, inventories[name])
            async with started({name: start}) as own:
                meter = Meter()
                turns = [("base", running["base"], "none", 0), (name, own[name], "identical", 1)]
                for number in range(rounds + 1):
                    await (meter if number else Meter()).round(DECODE, turns)
                found[name] = meter.ratio(name, "base")
    return found


def over_http(inventory: Inventory, tasks: int) -> float:
    """Median seconds of a registration, to the last of 200, with `tasks` tasks registered."""
    options = ["--engine", "vllm", "--eager", "--dtype", "bfloat16"]
    with (
        tempfile.TemporaryDirectory() as folder,
        server_process(inventory.path, Path(folder), *options) as (client, process),
    ):
        growth(client, process, inventory, tasks)
        return statistics.median(register(client, inventory, f"n-{n}", n) for n in range(200))


def table_bytes(inventory: Inventory, tasks: int) -> float:
    """What the routing table takes on the device for each of so many tasks."""
    table = RoutingTable(1 + tasks, *inventory.table_shape, torch.device("cpu"), torch.bfloat16)
    return table.weights.nbytes / (1 + tasks)


def ratios(eager: Meters, compiled: Meters, figures: dict[str, Any]) -> dict[str, float]:
    """The figures that goals are set for, flat; of the eager engines where not named compiled."""
    one = [eager.decode.ratio(f"{name} identical", "base") for name in MAIN]
    against = {"multilora": "multilora distinct", "base": "base"}
    found = {
        f"{name}_vs_{other}_distinct32": eager.decode.ratio(f"{name} distinct", turn)
        for name in MAIN
        for other, turn in against.items()
    }
    found["one_task_vs_base_min"] = min(*one, *figures["one_task_vs_base"].values())
    found["idle_vs_base"] = eager.decode.ratio("idle", "base")
    for tasks in (1_000, 10_000):
        found[f"tasks{tasks}_vs_tasks32"] = eager.decode.ratio(
            f"tensorpoly-1 uniform of {tasks}", "tensorpoly-1 uniform of 32"
        )
    for other, turn in against.items():
        found[f"prefill_vs_{other}_distinct32"] = eager.prefill.ratio("tensorpoly-1 distinct", turn)
        for meter, of_what in ((compiled.decode, "tensorpoly-1"), (compiled.prefill, "prefill")):
            key = f"{of_what}_vs_{other}_distinct32_compiled"
            found[key] = meter.ratio("tensorpoly-1 distinct", turn)
    found["layer8b_overhead_distinct32"] = figures["layers_8b"]["overhead_distinct32"]
    for key in ("register_ms_p50_10000_tasks", "device_bytes_per_task"):
        found[key] = figures[key]
    return found


async def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything; the document that is printed."""
    model = resolve_base(DEFAULT_BASE)
    adapters = folder / "adapters"
    write_adapters(Path(model), adapters, IN_FLIGHT)
    inventories = {
        name: random_inventory(folder, name, spec, model) for name, spec in (MAIN | OTHERS).items()
    }
    eager = await compare(model, inventories, adapters, True, options.rounds)
    compiled = await compare(model, inventories, adapters, False, options.rounds)
    http = await asyncio.to_thread(over_http, inventories["tensorpoly-1"], 10_000)
    figures: dict[str, Any] = {
        "machine": machine(),
        **{
            f"{work}_{mode}": getattr(meters, work).medians()
            for work in ("decode", "prefill")
            for mode, meters in (("eager", eager), ("compiled", compiled))
        },
        "one_task_vs_base": await one_task(model, inventories, options.rounds),
        "layers_8b": layers_8b(),
        "register_ms_p50_10000_tasks": round(1e3 * http, 2),
        "vllm_add_lora_ms_p50": round(1e3 * eager.add_lora, 1),
        "device_bytes_per_task": round(table_bytes(inventories["tensorpoly-1"], 10_000)),
    }
    return {"ratios": ratios(eager, compiled, figures), "figures": figures}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, help="folder for the JSON document, table and plot")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as folder:
        document = asyncio.run(measure(options, Path(folder)))
    if options.out:
        write_report(document, options.out)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
