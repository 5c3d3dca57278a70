"""`make bench-intuition`: the cost of routing a request by its own prompt.

A server process with a T-REX inventory answers the same prompts routed by a task and routed by
their own intuition, in turns: one request at a time to its first token, then 32 at once to their
last. The last line is one JSON document.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import httpx
import torch
import torch.nn.functional as F

from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.model.base_model import DEFAULT_BASE, resolve_base
from polyrex.adapters.model.intuition import EncoderIdentity, Intuition
from polyrex.adapters.model.sentence_encoder import SentenceEncoder
from polyrex.adapters.spec import AdapterSpec
from support.random_inventory import make_inventory

from .cases import REQUESTS
from .harness import Turns, command_line, machine, report, seconds_of
from .server_process import Fields, complete, register, server_process, tokens_per_second

CENTROIDS = 32
SPEC = AdapterSpec("trex", rank=4, rank_out=3, granularity="model", intuition=CENTROIDS)
WORDS = ("river", "budget", "planet", "violin", "harvest", "theorem", "garden", "engine")
ROUTINGS: dict[str, Fields] = {"task": {"task": "task"}, "prompt": {"intuition": "prompt"}}


def intuition_inventory(path: Path) -> Inventory:
    """Small random experts, and random centroids in the packaged encoder's space."""
    encoder, generator = SentenceEncoder(), torch.Generator().manual_seed(0)
    dimension = encoder.embed(["a"]).shape[1]
    centroids = torch.randn(CENTROIDS, dimension, generator=generator)
    identity = EncoderIdentity(encoder.name, dimension, encoder.identity)
    intuition = Intuition(F.normalize(centroids, dim=-1), identity, SPEC.gates)
    intuition.reset(generator)
    return make_inventory(path, resolve_base(DEFAULT_BASE), SPEC, 1e-3, intuition=intuition)


def prompts(number: int, count: int) -> list[str]:
    """Different prompts of about 45 tokens, as long as the rows of the shipped tasks."""
    return [
        f"Which category does this noun belong to? Number {number * count + i} of many.\n"
        f"{WORDS[i % 8]}: something that is found where people look for it, and is often "
        f"mentioned together with a {WORDS[(i + number) % 8]}\nAnswer:"
        for i in range(count)
    ]


def first_token_ms(client: httpx.Client, routing: Fields, number: int) -> float:
    """The median time of eight requests for one token, one after the other."""
    return 1e3 * statistics.median(
        seconds_of(complete, client, prompt=prompt, max_tokens=1, **routing)
        for prompt in prompts(number, 8)
    )


def prompt_routing_cost(rounds: int) -> dict[str, Any]:
    """Medians of both routings, and their ratios."""
    latency, rates = Turns(), Turns()
    with tempfile.TemporaryDirectory(prefix="polyrex-intuition-") as name:
        inventory = intuition_inventory(Path(name) / "inventory.safetensors")
        with server_process(inventory.path) as (client, _):
            register(client, inventory, ["task"])
            each = zip(latency.rounds(rounds), rates.rounds(rounds), strict=True)
            for number, (into_latency, into_rates) in enumerate(each):
                for way, routing in ROUTINGS.items():
                    into_latency.add(way, first_token_ms(client, routing, number))
                    requests = [
                        {"prompt": prompt, **routing} for prompt in prompts(number, REQUESTS)
                    ]
                    into_rates.add(way, tokens_per_second(client, requests))
    return {
        "first_token_ms": latency.medians(),
        "first_token_prompt_vs_task": latency.compare("prompt", "task").ratio,
        "tokens_per_second": rates.medians(),
        "throughput_prompt_vs_task": rates.compare("prompt", "task").ratio,
        "rounds": rounds,
        "machine": machine(),
    }


def main() -> None:
    """The command behind `make bench-intuition`."""
    options = command_line(__doc__, rounds=7).parse_args()
    report(prompt_routing_cost(options.rounds), options.out)


if __name__ == "__main__":
    main()
