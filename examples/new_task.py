"""From 32 rows to a live task over HTTP: fit it, ask it about words it has not seen.

python examples/new_task.py --server http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse
import json

import httpx

TASK = "comparative"
INSTRUCTION = "Give the comparative of the adjective."
ROWS = (
    "tall taller, short shorter, fast faster, slow slower, big bigger, small smaller, old older, "
    "young younger, warm warmer, cold colder, hot hotter, nice nicer, large larger, thin thinner, "
    "fat fatter, strong stronger, weak weaker, bright brighter, dark darker, happy happier, "
    "sad sadder, easy easier, hard harder, soft softer, deep deeper, wide wider, safe safer, "
    "cheap cheaper, rich richer, poor poorer, loud louder, quiet quieter"
)
NEW = ("long", "clean", "heavy", "brave")


def fit(client: httpx.Client, rows: list[dict[str, str]]) -> None:
    """Fit the task on the server, and print its events as they come."""
    body = {"instruction": INSTRUCTION, "rows": rows, "replace": True}
    # Beside a busy server, minutes may pass between two events.
    patient = httpx.Timeout(60, read=None)
    with client.stream("POST", f"/v1/tasks/{TASK}/fit", json=body, timeout=patient) as response:
        if response.is_error:
            raise SystemExit(json.loads(response.read())["error"]["message"])
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event.get("event") == "progress" and event["step"] % 6 == 0:
                print(f"step {event['step']:>2} of {event['steps']}, loss {event['loss']:.2f}")
            elif event.get("event") == "scored":
                print(f"held-out rows right: {event['adapted']:.0%}, base {event['base']:.0%}")
            elif event.get("event") == "registered":
                print(f"live: {TASK}, version {event['task']['version']},", end=" ")
                print(f"{event['task']['size_bytes']:,} bytes")
            elif event.get("event") == "refused" or "error" in event:
                raise SystemExit(event.get("reason") or event["error"]["message"])


def ask(client: httpx.Client, word: str, task: str | None) -> str:
    """The answer about one word, by the task or by the base model."""
    body = {"prompt": f"{INSTRUCTION}\n{word}\nAnswer:", "max_tokens": 8, "temperature": 0}
    answer = client.post("/v1/completions", json=body | ({"task": task} if task else {}))
    answer.raise_for_status()
    return " ".join(answer.json()["choices"][0]["text"].split()) or "(nothing)"


def main() -> None:
    """Fit a task, then ask it and the base model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="the server's address")
    rows = [dict(zip(("input", "answer"), row.split(), strict=True)) for row in ROWS.split(", ")]
    with httpx.Client(base_url=parser.parse_args().server, timeout=60) as client:
        fit(client, rows)
        for word in NEW:
            print(f"{word:<8}{ask(client, word, TASK):<12}base model: {ask(client, word, None)}")


if __name__ == "__main__":
    main()
