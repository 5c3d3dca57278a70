"""What `make bench-vllm` leaves behind: the JSON document, a Markdown table, a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no display
import matplotlib.pyplot as plt

COMMAND = "make bench-vllm"
FILE = "bench_vllm.json"
MODES = ("eager", "compiled")


def read_document(folder: Path) -> dict[str, Any]:
    """What an earlier run has written; an empty document where there is none."""
    path = folder / FILE
    if not path.exists():
        return {"ratios": {}, "figures": {}}
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def write_report(document: dict[str, Any], folder: Path) -> None:
    """Write bench_vllm.json, bench_vllm.md and bench_vllm.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(document, indent=2) + "\n")
    (folder / "bench_vllm.md").write_text(markdown(document))
    figures = document["figures"]
    parts = [part for part in (*MODES, "flat") if part in figures]
    shares = {part: _shares(figures[part]["decode"]) for part in parts}
    if "eager" in shares:
        shares["eager"] |= shares.pop("flat", {})
    if shares:
        plot(shares, figures["machine"]["cpu"], folder / "bench_vllm.png")


def _shares(rates: dict[str, float]) -> dict[str, float]:
    """Of the throughput with LoRA off. Parts are measured at different times: only their ratios
    can be compared."""
    return {name: rate / rates["base"] for name, rate in rates.items() if name != "base"}


def markdown(document: dict[str, Any]) -> str:
    """The ratios and throughputs as tables."""
    figures = document["figures"]
    about = ", ".join(f"{key} {value}" for key, value in figures["machine"].items())
    lines = [f"# polyrex on vLLM\n\nWritten by `{COMMAND}`. Machine: {about}.\n"]
    lines.append("Tables were measured at different times, at whatever speed the machine had.\n")
    spread: dict[str, list[float]] = {}
    for part in figures.values():
        spread |= part.get("quartiles", {})
    between = {name: f" ({low} to {high})" for name, (low, high) in spread.items()}
    ratios = {name: f"{value}{between.get(name, '')}" for name, value in document["ratios"].items()}
    lines += _table("ratio", "median (quartiles)", ratios)
    for mode in MODES:
        for work in ("decode", "prefill"):
            if mode in figures:
                lines += _table(f"{work}, {mode}: run", "tokens/s", figures[mode][work])
    if "flat" in figures:
        lines += _table(
            "decode, eager, more and more tasks: run", "tokens/s", figures["flat"]["decode"]
        )
    if "eager" in figures:
        one = figures["eager"]["one_task"] | figures.get("one_task", {})
        lines += _table("one task for all requests, eager: method", "/ base", one)
        add = figures["eager"]["add_lora_ms_p50"]
        lines.append(f"vLLM's `add_lora` of one adapter in the page cache: {add} ms (median).\n")
    if "layers" in figures:
        lines += _layers(figures["layers"])
    return "\n".join(lines)


def _table(first: str, second: str, rows: dict[str, Any]) -> list[str]:
    body = [f"| {name} | {value} |" for name, value in rows.items()]
    return [f"| {first} | {second} |", "|---|---|", *body, ""]


def _layers(layers: dict[str, Any]) -> list[str]:
    """What 32 tasks add to the frozen product at an 8B model's shapes, beside the roofline's."""
    columns = "base ms | shared adds | composed adds | roofline: base ms | shared | composed"
    lines = [f"| layer of an 8B model | {columns} |", "|---" * 7 + "|"]
    for shape, found in layers["seconds"].items():
        seconds = found["base"], found["shared 32"], found["composed 32"]
        predicted = [layers["predicted"][shape][path] for path in ("base", "shared", "composed")]
        cells = (
            f"{1e3 * base:.3g} | {shared / base:.0%} | {composed / base:.0%}"
            for base, shared, composed in (seconds, predicted)
        )
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    return [*lines, ""]


def plot(modes: dict[str, dict[str, float]], cpu: str, path: Path) -> None:
    """Every decode-heavy run as a share of the throughput with LoRA off, by mode."""
    names = list(dict.fromkeys(name for shares in modes.values() for name in shares))
    figure, axes = plt.subplots(figsize=(9, 0.35 * len(names) + 1.5))
    for offset, (mode, shares) in zip((-0.2, 0.2), modes.items(), strict=False):
        known = [number for number, name in enumerate(names) if name in shares]
        values = [shares[names[number]] for number in known]
        axes.barh([number + offset for number in known], values, 0.4, label=mode)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s over those of vLLM with LoRA off, 32 requests of 17 + 32 tokens")
    axes.set_title(f"SmolLM2-135M, bfloat16, {cpu}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
