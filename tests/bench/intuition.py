"""`make bench-intuition`: what it costs a request to be routed by its own prompt.

A server process with a T-REX inventory answers the same prompts routed by a task and routed by
their own intuition, in turns: one request at a time to its first token, then 32 at once to their
last. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
import torch.nn.functional as F
from torch import nn

from polyrex.adapters.files.inventory import Inventory, read_inventory, write_inventory
from polyrex.adapters.model.attach import attach, find_targets
from polyrex.adapters.model.base_model import DEFAULT_BASE, load_base, resolve_base
from polyrex.adapters.model.intuition import EncoderIdentity, Intuition, gates_of
from polyrex.adapters.model.sentence_encoder import SentenceEncoder
from polyrex.adapters.spec import AdapterSpec

from .serving import machine, register, server_process

SPEC = AdapterSpec("trex", rank=4, rank_out=3, granularity="model", intuition=32)
AT_ONCE, NEW_TOKENS = 32, 32
WORDS = ("river", "budget", "planet", "violin", "harvest", "theorem", "garden", "engine")
Routing = dict[str, str]
BY_TASK: Routing = {"task": "task"}
BY_PROMPT: Routing = {"intuition": "prompt"}


def random_inventory(path: Path) -> Inventory:
    """Small random experts on every projection, and centroids in the packaged encoder's space."""
    encoder, generator = SentenceEncoder(), torch.Generator().manual_seed(0)
    dimension = encoder.embed(["a"]).shape[1]
    centroids = torch.randn(SPEC.intuition or 0, dimension, generator=generator)
    identity = EncoderIdentity(encoder.name, dimension, encoder.identity)
    intuition = Intuition(F.normalize(centroids, dim=-1), identity, gates_of(SPEC))
    intuition.reset(generator)
    base = load_base(resolve_base(DEFAULT_BASE), torch.float32)
    adapted = attach(base, SPEC, find_targets(base), intuition=intuition)
    for layer in adapted.layers:
        nn.init.normal_(layer.experts.get_parameter("lora_b"), std=1e-3, generator=generator)
    write_inventory(path, adapted)
    return read_inventory(path)


def prompts(number: int, count: int) -> list[str]:
    """Prompts of about 45 tokens, as the rows of the shipped tasks have them; no two are alike."""
    return [
        f"Which category does this noun belong to? Number {number * count + i} of many.\n"
        f"{WORDS[i % 8]}: something that is found where people look for it, and is often "
        f"mentioned together with a {WORDS[(i + number) % 8]}\nAnswer:"
        for i in range(count)
    ]


def ask(client: httpx.Client, prompt: str, routing: Routing, new: int) -> None:
    """One completion, to its end."""
    body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, **routing}
    client.post("/v1/completions", json=body).raise_for_status()


def first_token(client: httpx.Client, routing: Routing, number: int) -> float:
    """Seconds of a request for one token: the median of 8, one after the other."""
    seconds = []
    for prompt in prompts(number, 8):
        started = time.perf_counter()
        ask(client, prompt, routing, 1)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def throughput(client: httpx.Client, routing: Routing, number: int) -> float:
    """New tokens a second of many requests at once."""
    started = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = [
            pool.submit(ask, client, prompt, routing, NEW_TOKENS)
            for prompt in prompts(number, AT_ONCE)
        ]
        for job in jobs:
            job.result()
    return AT_ONCE * NEW_TOKENS / (time.perf_counter() - started)


def measure(rounds: int) -> dict[str, Any]:
    """Medians of both ways, and of the ratios of neighbours."""
    latency: dict[str, list[float]] = {"task": [], "prompt": []}
    rates: dict[str, list[float]] = {"task": [], "prompt": []}
    ways = {"task": BY_TASK, "prompt": BY_PROMPT}
    with tempfile.TemporaryDirectory(prefix="polyrex-intuition-") as name:
        inventory = random_inventory(Path(name) / "inventory.safetensors")
        with server_process(inventory.path, Path(name) / "tasks") as (client, _):
            register(client, inventory, {"task": 0})
            for number in range(rounds + 1):  # the first one warms up
                for way, routing in ways.items():
                    latency[way].append(first_token(client, routing, number))
                    rates[way].append(throughput(client, routing, number))

    def median(values: dict[str, list[float]], way: str) -> float:
        return statistics.median(values[way][1:])

    def ratio(values: dict[str, list[float]]) -> float:
        pairs = zip(values["prompt"][1:], values["task"][1:], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    return {
        "first_token_ms": {way: round(1e3 * median(latency, way), 1) for way in ways},
        "first_token_prompt_vs_task": ratio(latency),
        "tokens_per_second": {way: round(median(rates, way), 1) for way in ways},
        "throughput_prompt_vs_task": ratio(rates),
        "rounds": rounds,
        "machine": machine(),
    }


def main() -> None:
    """The command behind `make bench-intuition`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    options = parser.parse_args()
    result = measure(options.rounds)
    options.out.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
