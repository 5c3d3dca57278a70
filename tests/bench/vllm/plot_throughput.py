"""Draw docs/images/throughput.svg from tests/results/bench_vllm.json.

Run it from the root of the repository: `python tests/bench/vllm/plot_throughput.py`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no display
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[3]
FIGURES = ROOT / "tests" / "results" / "bench_vllm.json"
CHART = ROOT / "docs" / "images" / "throughput.svg"

THEIRS = "vLLM multi-LoRA"
METHODS = {
    "tensorpoly-1": "TensorPoly-I",
    "tensorpoly-2": "TensorPoly-II",
    "trex-static": "static T-REX",
}
GROUND, INK, SOFT, OURS, OTHERS = "#faf8f3", "#1f2430", "#5b6270", "#3b6fb6", "#a9a595"


@dataclass(frozen=True)
class Bar:
    """A throughput over that of vLLM's multi-LoRA, its quartiles, and the words beside it."""

    name: str
    value: float
    quartiles: tuple[float, float]
    beside: str


def bars(document: dict[str, Any]) -> list[Bar]:
    """The chart's bars, from the top."""
    ratios, quartiles = document["ratios"], document["figures"]["eager"]["quartiles"]
    found = [Bar(THEIRS, 1, (1, 1), "1")]
    for key, name in METHODS.items():
        ratio = f"{key}_vs_multilora_distinct32"
        of_base = ratios[f"{key}_vs_base_distinct32"]
        beside = f"{ratios[ratio]:.1f}, and {of_base:.2f} of vLLM without adapters"
        found.append(Bar(f"polyrex, {name}", ratios[ratio], tuple(quartiles[ratio]), beside))
    return found


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the chart as an SVG whose text stays text, the same on every run."""
    rows = bars(document)
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "polyrex"}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(9, 2.9), facecolor=GROUND)
        places = list(range(len(rows), 0, -1))
        colours = [OTHERS if row.name == THEIRS else OURS for row in rows]
        axes.barh(places, [row.value for row in rows], color=colours, height=0.6)
        for place, row in zip(places, rows, strict=True):
            if row.name != THEIRS:
                axes.plot(row.quartiles, (place, place), color=INK, linewidth=1.5)
            axes.text(row.quartiles[1] + 0.12, place, row.beside, va="center", color=INK)
        axes.set_yticks(places, [row.name for row in rows], fontsize=11, color=INK)
        axes.set_xlim(0, 2.1 * max(row.value for row in rows))
        axes.set_xticks([])
        axes.set_facecolor(GROUND)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        title = "Throughput over vLLM’s multi-LoRA, 32 requests of 32 tasks at once"
        figure.text(0.015, 0.91, title, fontsize=13, color=INK, fontweight="bold")
        about = (
            f"SmolLM2-135M, {document['figures']['machine']['cores']} shared CPU cores, rank 16, "
            "17 + 32 tokens a request. Medians; lines: quartiles. From make bench-vllm."
        )
        figure.text(0.015, 0.04, about, fontsize=9, color=SOFT)
        figure.tight_layout(rect=(0, 0.08, 1, 0.9))
        figure.savefig(path, format="svg", facecolor=GROUND, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    """Draw the chart from the figures that were measured last."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=CHART)
    draw(json.loads(FIGURES.read_text()), parser.parse_args().out)


if __name__ == "__main__":
    main()
