"""What `make bench-vllm` leaves behind: the JSON document, a Markdown table, a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no display
import matplotlib.pyplot as plt

COMMAND = "make bench-vllm"


def write_report(document: dict[str, Any], folder: Path) -> None:
    """Write bench_vllm.json, bench_vllm.md and bench_vllm.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench_vllm.json").write_text(json.dumps(document, indent=2) + "\n")
    (folder / "bench_vllm.md").write_text(markdown(document))
    plot(document["figures"], folder / "bench_vllm.png")


def markdown(document: dict[str, Any]) -> str:
    """The ratios and throughputs as tables."""
    figures = document["figures"]
    about = ", ".join(f"{key} {value}" for key, value in figures["machine"].items())
    lines = [f"# polyrex on vLLM\n\nWritten by `{COMMAND}`. Machine: {about}.\n"]
    lines += _table("ratio", "value", document["ratios"])
    for key in ("decode_eager", "decode_compiled", "prefill_eager", "prefill_compiled"):
        lines += _table(f"{key.replace('_', ', ')}: run", "tokens/s", figures[key])
    lines += _table(
        "one task for all requests, eager: method", "/ base", figures["one_task_vs_base"]
    )
    lines += _table(
        "layer shapes of an 8B model", "seconds", _flat(figures["layers_8b"]["seconds"])
    )
    add = figures["vllm_add_lora_ms_p50"]
    lines.append(f"vLLM's `add_lora` of one adapter in the page cache: {add} ms (median).\n")
    return "\n".join(lines)


def _table(first: str, second: str, rows: dict[str, Any]) -> list[str]:
    body = [f"| {name} | {value} |" for name, value in rows.items()]
    return [f"| {first} | {second} |", "|---|---|", *body, ""]


def _flat(nested: dict[str, dict[str, float]]) -> dict[str, str]:
    """One row a shape: its columns in one cell."""
    return {
        shape: ", ".join(f"{name} {seconds:.2e}" for name, seconds in columns.items())
        for shape, columns in nested.items()
    }


def plot(figures: dict[str, Any], path: Path) -> None:
    """Throughput of every run of the two decode-heavy modes."""
    modes = {"eager": figures["decode_eager"], "compiled": figures["decode_compiled"]}
    names = list(modes["eager"])
    figure, axes = plt.subplots(figsize=(9, 0.35 * len(names) + 1.5))
    for offset, (mode, rates) in zip((-0.2, 0.2), modes.items(), strict=True):
        known = [number for number, name in enumerate(names) if name in rates]
        values = [rates[names[number]] for number in known]
        axes.barh([number + offset for number in known], values, 0.4, label=mode)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s, 32 requests of 17 + 32 tokens at once")
    axes.set_title(f"SmolLM2-135M, bfloat16, {figures['machine']['cpu']}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
