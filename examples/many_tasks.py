"""Register many tasks, ask all of them at once, and see what the mix costs.

Every task here is a copy of a task that is there, under a name of its own and with a router of its
own: its weights are turned a little, so that no two tasks of the batch are the same to the server.

    python examples/many_tasks.py --server http://127.0.0.1:8000 --tasks 32
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

SHIPPED = Path(__file__).parents[1] / "adapters/shipped/smollm2-135m-instruct"
ROUTER = SHIPPED / "routers/question_form.safetensors"
PROMPT = "Turn the statement into a question.\nthe dog is sleeping\nAnswer:"


def router(seed: int) -> bytes:
    """A router file: routing logits, and metadata that say which inventory they belong to."""
    with safe_open(ROUTER, "np") as file:
        logits, metadata = file.get_tensor("routing"), file.metadata()
    noise = np.random.default_rng(seed).normal(0, 0.01, logits.shape)
    return save({"routing": (logits + noise).astype(np.float32)}, metadata)


def complete(client: httpx.Client, task: str | None) -> int:
    """Ask for 32 tokens, by a task or by the base model; how many came."""
    body = {"prompt": PROMPT, "max_tokens": 32, "temperature": 0, "ignore_eos": True}
    answer = client.post("/v1/completions", json=body | ({"task": task} if task else {}))
    answer.raise_for_status()
    tokens: int = answer.json()["usage"]["completion_tokens"]
    return tokens


def tokens_per_second(client: httpx.Client, tasks: list[str | None]) -> float:
    """The throughput of one request a task, all sent at once."""
    start = time.perf_counter()
    with ThreadPoolExecutor(len(tasks)) as pool:
        tokens = sum(pool.map(lambda task: complete(client, task), tasks))
    return tokens / (time.perf_counter() - start)


def main() -> None:
    """Register tasks, then compare a batch of all of them with one task, and with none."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="the server's address")
    parser.add_argument("--tasks", type=int, default=32, help="tasks, and requests in a batch")
    options = parser.parse_args()
    names = [f"many-{number}" for number in range(options.tasks)]
    binary = {"content-type": "application/octet-stream"}
    with httpx.Client(base_url=options.server, timeout=300) as client:
        start = time.perf_counter()
        for number, name in enumerate(names):
            file = router(number)
            client.put(f"/v1/tasks/{name}", content=file, headers=binary).raise_for_status()
        each = (time.perf_counter() - start) / len(names) * 1000
        print(f"registered {len(names)} tasks of {len(file):,} bytes, {each:.1f} ms each")
        batches: dict[str, list[str | None]] = {
            f"{len(names)} tasks": list(names),
            "one task": list(names[:1] * len(names)),
            "no task": [None] * len(names),
        }
        turns = [[tokens_per_second(client, tasks) for tasks in batches.values()] for _ in range(2)]
        for label, rates in zip(batches, zip(*turns, strict=True), strict=True):
            print(f"{label:<10}{max(rates):7.1f} tokens/s, the faster of two turns")
        for name in names:
            client.delete(f"/v1/tasks/{name}").raise_for_status()


if __name__ == "__main__":
    main()
