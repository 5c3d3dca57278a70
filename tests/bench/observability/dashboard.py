"""Draw docs/images/dashboard.svg: the panels of docs/observability/dashboard.json.

A server with the shipped inventory is put under load while Prometheus scrapes it; then every
panel's query is asked for the whole time, kept in `--out`, and drawn. With `--redraw`, what was
kept is drawn again.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.harness import command_line, machine, report
from bench.server_process import server_process
from polyrex.server.launch.loading import shipped_inventory
from support.observability.load import Load
from support.observability.prometheus import (
    NOT_INSTALLED,
    Prometheus,
    Series,
    filled,
    installed,
    panels,
    scraping,
)
from support.tenants.identities import make_key, make_tenant

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "docs" / "images" / "dashboard.svg"
FIGURES = ROOT / "tests" / "results" / "dashboard.json"

GROUND, INK, SOFT = "#faf8f3", "#1f2430", "#5b6270"
COLOURS = ("#3b6fb6", "#c2703d", "#4f8a5b", "#8a5fa8", "#a9a595", "#b0413e", "#3f8f95", "#c9a227")
UNITS = {"s": "seconds", "reqps": "a second", "percentunit": "share", "short": ""}
_WINDOW = "30s"
_STEPS = 60

Panel = dict[str, Any]


def measure(seconds: float) -> dict[str, Any]:
    """Put a server under load for so long, and return its panels with their series."""
    inventory = shipped_inventory("smollm2-135m-instruct")
    with (
        tempfile.TemporaryDirectory(prefix="polyrex-dashboard-") as folder,
        server_process(inventory, "--embedded.prefix-cache") as (client, _),
        scraping(str(client.base_url), Path(folder), 2) as prometheus,
    ):
        tasks = [each["name"] for each in client.get("/v1/tasks").json()["data"]][:12]
        models = [f"default:{task}" for task in tasks]  # as every tenant may call them
        make_tenant(client, "acme", requests_per_minute=60)
        make_tenant(client, "globex")
        keys = ["none", *(make_key(client, tenant, "inference") for tenant in ("acme", "globex"))]
        for tenant in ("acme", "globex"):
            for task in tasks:
                client.put(f"/v1/tasks/{task}/shared_with/{tenant}").raise_for_status()
        begun = time.time()
        third = seconds / 3  # quiet, busy, quiet
        for clients in (2, 12, 2):
            with Load(str(client.base_url), keys, models, clients, pause=0.3).running():
                time.sleep(third)
        return {
            "machine": machine(),
            "seconds": seconds,
            "panels": [_ask(prometheus, panel, begun, seconds) for panel in panels()],
        }


def _ask(prometheus: Prometheus, panel: Panel, begun: float, seconds: float) -> Panel:
    """A panel with what its queries give, at equal steps from the beginning to the end."""
    step = seconds / _STEPS
    lines = []
    for target in panel["targets"]:
        expression = filled(target["expr"], _WINDOW)
        for series in prometheus.query_range(expression, begun, begun + seconds, step):
            found = {round((at - begun) / step): value for at, value in series.values}
            values = [_rounded(found.get(number, math.nan)) for number in range(_STEPS + 1)]
            lines.append({"name": _legend(target["legendFormat"], series), "values": values})
    unit = panel["fieldConfig"]["defaults"]["unit"]
    return {"title": panel["title"], "type": panel["type"], "unit": unit, "lines": lines}


def _legend(form: str, series: Series) -> str:
    """The name of a series, as Grafana makes it of its labels."""
    return re.sub(r"{{(\w+)}}", lambda found: series.labels.get(found[1], ""), form).strip()


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.4g}")


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the panels as an SVG whose text stays text, the same on every run."""
    shown: Sequence[Panel] = document["panels"]
    rows = -(-len(shown) // 3)
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "polyrex", "font.size": 8}
    with plt.rc_context(style):
        figure, grid = plt.subplots(
            rows, 3, figsize=(12, 2.35 * rows), facecolor=GROUND, squeeze=False
        )
        for axes, panel in zip(grid.flat, shown, strict=False):
            _draw_panel(axes, panel, document["seconds"])
        for axes in list(grid.flat)[len(shown) :]:
            axes.set_visible(False)
        about = document["machine"]
        words = (
            f"SmolLM2-135M on {about['cores']} shared CPU cores, {document['seconds']:g} s: "
            "2 clients, then 12, then 2. Minutes from left to right."
        )
        figure.text(0.02, 0.006, words, color=SOFT, fontsize=9)
        figure.tight_layout(rect=(0, 0.015, 1, 1), h_pad=1.6, w_pad=1.4)
        figure.savefig(path, format="svg", facecolor=GROUND, metadata={"Date": None})
        plt.close(figure)


def _draw_panel(axes: Axes, panel: Panel, seconds: float) -> None:
    unit = UNITS[panel["unit"]]
    title = panel["title"] + (f" ({unit})" if unit else "")
    axes.set_title(title, fontsize=9.5, color=INK, loc="left", fontweight="bold")
    axes.set_facecolor(GROUND)
    axes.tick_params(length=2, colors=SOFT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SOFT)
    if panel["type"] == "stat":
        _draw_numbers(axes, panel)
    else:
        _draw_lines(axes, panel, seconds)


def _draw_lines(axes: Axes, panel: Panel, seconds: float) -> None:
    minutes = [number * seconds / _STEPS / 60 for number in range(_STEPS + 1)]
    for line, colour in zip(panel["lines"], COLOURS, strict=False):
        values = [math.nan if value is None else value for value in line["values"]]
        axes.plot(minutes, values, color=colour, linewidth=1.2, label=line["name"])
    axes.set_xlim(0, seconds / 60)
    axes.set_ylim(bottom=0)
    axes.legend(
        fontsize=6.5, frameon=False, labelcolor=INK, loc="upper left",
        bbox_to_anchor=(0, 1.02), ncols=2, columnspacing=1, handlelength=1.2,
    )  # fmt: skip
    axes.set_ylim(top=axes.get_ylim()[1] * 1.45)  # room for the legend


def _draw_numbers(axes: Axes, panel: Panel) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    for number, line in enumerate(panel["lines"]):
        left = 0.02 + number / 2
        axes.text(left, 0.5, f"{line['values'][-1]:g}", fontsize=22, color=COLOURS[0])
        axes.text(left, 0.3, line["name"], fontsize=7, color=SOFT)


def main() -> None:
    """Measure and draw, or draw again."""
    parser = command_line(__doc__)
    parser.add_argument("--seconds", type=float, default=300, help="default: %(default)s")
    parser.add_argument("--redraw", action="store_true", help="draw what was kept before")
    parser.set_defaults(out=FIGURES)
    options = parser.parse_args()
    if options.redraw:
        document = json.loads(options.out.read_text())
    elif not installed():
        raise SystemExit(NOT_INSTALLED)
    else:
        document = measure(options.seconds)
        report(document, options.out, {"panels": len(document["panels"])})
    draw(document, CHART)


if __name__ == "__main__":
    main()
