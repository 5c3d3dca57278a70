"""`make bench-vllm`: vLLM with LoRA off, vLLM's own multi-LoRA, and polyrex on vLLM, side by side.

All engines of one mode (eager, then compiled) are started first and stay; then they answer the
same requests in turn, round after round, so that a slow moment of the machine meets them all.
Ratios are taken within a round, and their median is reported. Every prompt is new, so that no
prefix cache helps anybody. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
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
from .vllm_bench_engines import IN_FLIGHT, Contender, Plain, Polyrex
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


@dataclass(frozen=True)
class Workload:
    """Requests that are sent at once, all of one shape."""

    name: str
    prompt: int
    new: int

    @property
    def tokens(self) -> int:
        """What the throughput counts: new tokens, and the prompt's where those are the work."""
        counted = self.new if self.prompt < self.new else self.prompt + self.new
        return IN_FLIGHT * counted


DECODE, PREFILL = Workload("decode", 17, 32), Workload("prefill", 512, 8)


@dataclass
class Meter:
    """Measures contenders with requests that are the same for all of them."""

    seed: int = 0
    rates: dict[str, list[float]] = field(default_factory=dict)

    async def round(self, work: Workload, turns: Sequence[tuple[str, Contender, str, int]]) -> None:
        """One turn each of (name, contender, popularity, how many tasks there are)."""
        for name, contender, popularity, tasks in turns:
            chosen = popular(popularity, tasks, random.Random(self.seed))
            rate = await self._rate(work, contender, chosen)
            self.rates.setdefault(name, []).append(rate)
            print(f"{name}: {rate:.1f} tokens/s", flush=True)
        self.seed += 1

    async def _rate(
        self, work: Workload, contender: Contender, tasks: Sequence[int | None]
    ) -> float:
        draw = random.Random(time.monotonic_ns())  # never the same prompt twice

        async def one(task: int | None) -> int:
            prompt = [draw.randrange(100, 40_000) for _ in range(work.prompt)]
            async with aclosing(contender.answer(prompt, work.new, task)) as tokens:
                return sum([count async for count in tokens])

        started = time.perf_counter()
        found = sum(await asyncio.gather(*(one(task) for task in tasks)))
        assert found == IN_FLIGHT * work.new
        return work.tokens / (time.perf_counter() - started)

    def ratio(self, over: str, under: str) -> float:
        """Median over rounds."""
        pairs = zip(self.rates[over], self.rates[under], strict=False)
        return round(statistics.median(a / b for a, b in pairs), 3)

    def medians(self) -> dict[str, float]:
        return {name: round(statistics.median(rates), 1) for name, rates in self.rates.items()}


def popular(popularity: str, tasks: int, draw: random.Random) -> list[int | None]:
    """The tasks of IN_FLIGHT requests."""
    everyone = range(tasks)
    if popularity == "none":
        return [None] * IN_FLIGHT
    if popularity == "identical":
        return [0] * IN_FLIGHT
    if popularity == "distinct":
        return list(range(IN_FLIGHT))
    if popularity == "uniform":
        return [draw.choice(everyone) for _ in range(IN_FLIGHT)]
    assert popularity == "zipf"
    weights = [1 / (rank + 1) for rank in everyone]
    return list(draw.choices(everyone, weights, k=IN_FLIGHT))


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


@asynccontextmanager
async def started(engines: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    """Engines by name, from what starts each; stopped at the end, whatever happens."""
    running: dict[str, Any] = {}
    try:
        for name, start in engines.items():
            print(f"starting {name}", flush=True)
            running[name] = await start
        yield running
    finally:
        for engine in running.values():
            await engine.stop()
        gc.collect()


def decode_turns(engines: dict[str, Any]) -> list[tuple[str, Contender, str, int]]:
    """A round of the decode-heavy workload."""
    base, theirs, ours = engines["base"], engines["multilora"], engines["tensorpoly-1"]
    turns = [("base", base, "none", 0), ("idle", ours, "none", 0)]
    for popularity in ("distinct", "identical", "uniform", "zipf"):
        turns.append((f"multilora {popularity}", theirs, popularity, IN_FLIGHT))
    for name in MAIN:
        if name in engines:
            for popularity in ("distinct", "identical"):
                turns.append((f"{name} {popularity}", engines[name], popularity, IN_FLIGHT))
    for tasks in (32, 1_000, 10_000):
        turns.append((f"tensorpoly-1 uniform of {tasks}", ours, "uniform", tasks))
    turns.append(("tensorpoly-1 zipf of 10000", ours, "zipf", 10_000))
    return turns


async def compare(
    model: str, inventories: dict[str, Inventory], adapters: Path, eager: bool, rounds: int
) -> tuple[Meter, Meter, float]:
    """One mode: decode-heavy and prefill-heavy meters, and vLLM's median add_lora in seconds."""
    names = MAIN if eager else ("tensorpoly-1",)
    engines: dict[str, Any] = {
        "base": Plain.start(model, eager),
        "multilora": Plain.start(model, eager, adapters),
        **{name: Polyrex.start(model, eager, inventories[name]) for name in names},
    }
    decode, prefill = Meter(), Meter()
    async with started(engines) as running:
        added = [await running["multilora"].add(task) for task in range(IN_FLIGHT)]
        turns = decode_turns(running)
        warm_up = Meter()
        await warm_up.round(DECODE, turns)
        for _ in range(rounds):
            await decode.round(DECODE, turns)
        base, ours = running["base"], running["tensorpoly-1"]
        for _ in range(2):
            await prefill.round(
                PREFILL,
                [
                    ("base", base, "none", 0),
                    ("tensorpoly-1 distinct", ours, "distinct", IN_FLIGHT),
                    ("tensorpoly-1 identical", ours, "identical", IN_FLIGHT),
                ],
            )
        slow = [("multilora distinct", running["multilora"], "distinct", IN_FLIGHT)]
        await prefill.round(PREFILL, slow)
    return decode, prefill, statistics.median(added)


async def one_task(model: str, inventories: dict[str, Inventory], rounds: int) -> dict[str, float]:
    """Every other method, one task for all requests, over the base."""
    found = {}
    async with started({"base": Plain.start(model, True)}) as running:
        for name in OTHERS:
            async with started({name: Polyrex.start(model, True, inventories[name])}) as own:
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


def ratios(figures: dict[str, Any], decode: Meter, prefill: Meter) -> dict[str, float]:
    """The figures that goals are set for, flat; eager."""
    one = [decode.ratio(f"{name} identical", "base") for name in MAIN]
    return {
        "tensorpoly-1_vs_multilora_distinct32": decode.ratio(
            "tensorpoly-1 distinct", "multilora distinct"
        ),
        **{f"{n}_vs_base_distinct32": decode.ratio(f"{n} distinct", "base") for n in MAIN},
        **{
            f"{n}_vs_multilora_distinct32": decode.ratio(f"{n} distinct", "multilora distinct")
            for n in MAIN
        },
        "one_task_vs_base_min": min(*one, *figures["one_task_vs_base"].values()),
        "idle_vs_base": decode.ratio("idle", "base"),
        "tasks1000_vs_tasks32": decode.ratio(
            "tensorpoly-1 uniform of 1000", "tensorpoly-1 uniform of 32"
        ),
        "tasks10000_vs_tasks32": decode.ratio(
            "tensorpoly-1 uniform of 10000", "tensorpoly-1 uniform of 32"
        ),
        "prefill_vs_multilora_distinct32": prefill.ratio(
            "tensorpoly-1 distinct", "multilora distinct"
        ),
        "prefill_vs_base_distinct32": prefill.ratio("tensorpoly-1 distinct", "base"),
        "layer8b_overhead_distinct32": figures["layers_8b"]["overhead_distinct32"],
        "register_ms_p50_10000_tasks": figures["register_ms_p50_10000_tasks"],
        "device_bytes_per_task": figures["device_bytes_per_task"],
    }


async def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything; the document that is printed."""
    model = resolve_base(DEFAULT_BASE)
    adapters = folder / "adapters"
    write_adapters(Path(model), adapters, IN_FLIGHT)
    inventories = {
        name: random_inventory(folder, name, spec, model) for name, spec in (MAIN | OTHERS).items()
    }
    decode, prefill, added = await compare(model, inventories, adapters, True, options.rounds)
    compiled, _, _ = await compare(model, inventories, adapters, False, options.rounds)
    http = await asyncio.to_thread(over_http, inventories["tensorpoly-1"], 10_000)
    figures: dict[str, Any] = {
        "machine": machine(),
        "decode_eager": decode.medians(),
        "decode_compiled": compiled.medians(),
        "prefill_eager": prefill.medians(),
        "one_task_vs_base": await one_task(model, inventories, options.rounds),
        "layers_8b": layers_8b(),
        "register_ms_p50_10000_tasks": round(1e3 * http, 2),
        "vllm_add_lora_ms_p50": round(1e3 * added, 1),
        "device_bytes_per_task": round(table_bytes(inventories["tensorpoly-1"], 10_000)),
    }
    return {"ratios": ratios(figures, decode, prefill), "figures": figures}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
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
