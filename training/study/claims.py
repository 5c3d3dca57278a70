"""The papers' claims, each judged by the study's cells.

Each claim is about the difference between two variants that answered the same test rows. It holds,
or does not, only if the difference is at least two paired standard errors away from the goal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .report import paired
from .variants import StudyConfig, run_name

Rows = Literal["held_in", "zero_shot", "adapted"]
"""The test rows of held_in tasks, of held_out tasks without adaptation, or of held_out tasks after
adaptation."""

ROWS: dict[Rows, str] = {
    "held_in": "held_in",
    "zero_shot": "held_out, not adapted",
    "adapted": "held_out, adapted",
}


@dataclass(frozen=True)
class Claim:
    """The claim that `first` is at least `goal` points above `second`, with at most `parameters`
    times as many trained parameters if that is part of it.

    For adapted tasks, names include the mode. If `first` is None, it is the best modular method.
    """

    text: str
    rows: Rows
    first: str | None
    second: str
    goal: float = 0.0
    parameters: float | None = None


ONE_SEED = "open: one seed of training"
"""LoRA's held_in mean differs by 3.4 points between seeds, so one seed says nothing of a method."""

TREX = ("trex-mix-intuition", "trex-diagonal-intuition", "trex-mix", "trex-diagonal")
_TRAINED: tuple[Rows, ...] = ("held_in", "zero_shot")

CLAIMS = (
    Claim("The best modular method beats shared LoRA", "adapted", None, "lora-modules", 2.0),
    *(
        Claim(
            "TensorPoly-I, routing alone, comes near few-shot LoRA",
            "adapted",
            f"tensorpoly-1-{size}-routing",
            "lora-modules",
            -3.0,
            1 / 150,
        )
        for size in ("e8-n2", "e20-n2", "e8-n4", "e20-n4", "e8-n2-block", "e8-n4-block")
    ),
    *(
        Claim("T-REX beats shared LoRA with fewer parameters", rows, trex, "lora", 1.0, 0.7)
        for rows in _TRAINED
        for trex in TREX
    ),
    Claim("Intuition helps T-REX", "held_in", "trex-mix-intuition", "trex-mix"),
    Claim("Intuition helps T-REX", "held_in", "trex-diagonal-intuition", "trex-diagonal"),
    Claim("Intuition helps T-REX", "zero_shot", "trex-mix-intuition", "trex-mix"),
    Claim("Intuition helps T-REX", "zero_shot", "trex-diagonal-intuition", "trex-diagonal"),
    Claim("Mix-and-match beats the diagonal", "held_in", "trex-mix", "trex-diagonal"),
    *(Claim("T-REX beats MoLoRA", "held_in", trex, "molora") for trex in TREX),
    Claim("TensorPoly-I beats TLoRA", "held_in", "tensorpoly-1-e8-n2", "tlora"),
    Claim("Poly beats LoRA", "held_in", "poly", "lora"),
    Claim("MHR beats LoRA", "held_in", "mhr", "lora"),
    Claim("TensorPoly-I beats LoRA", "held_in", "tensorpoly-1-e8-n2", "lora"),
    Claim("TensorPoly-X beats LoRA", "held_in", "tensorpoly-x", "lora"),
    Claim(
        "TensorPoly-I is as good as Poly with fewer parameters",
        "held_in",
        "tensorpoly-1-e8-n2",
        "poly",
        0.0,
        1.0,
    ),
    Claim(
        "TensorPoly-I is as good as Poly with fewer parameters",
        "adapted",
        "tensorpoly-1-e8-n2-both",
        "poly-both",
        0.0,
        1.0,
    ),
    Claim("MHR beats Poly", "adapted", "mhr-routing", "poly-routing"),
    Claim(
        "Order 4 adapts by routing better than order 2",
        "adapted",
        "tensorpoly-1-e8-n4-routing",
        "tensorpoly-1-e8-n2-routing",
    ),
    Claim(
        "Routing each order (II) is no better than routing experts (I)",
        "adapted",
        "tensorpoly-1-e8-n2-routing",
        "tensorpoly-2-routing",
    ),
    *(
        Claim(
            "Routing each module adapts better than routing each block",
            "adapted",
            f"tensorpoly-1-{size}-routing",
            f"tensorpoly-1-{size}-block-routing",
        )
        for size in ("e8-n2", "e8-n4")
    ),
    Claim(
        "Routing and modules together beat routing alone",
        "adapted",
        "tensorpoly-1-e8-n2-both",
        "tensorpoly-1-e8-n2-routing",
    ),
)


def judge(config: StudyConfig, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The finding for each claim whose two variants are finished."""
    modular = {v.name for v in config.variants if v.spec.method not in ("lora", "tlora")}
    adapted = {n: each for n, each in summary["ablations"].items() if each["variant"] in modular}
    best = max(adapted, key=lambda name: adapted[name]["held_out_mean"], default="")
    found = []
    for claim in CLAIMS:
        names = claim.first or best, claim.second
        known = summary["ablations" if claim.rows == "adapted" else "methods"]
        if not all(name in known for name in names):
            continue
        seeds = _seeds(config, names) if claim.rows != "adapted" else ()
        first, second = (_entries(config, claim.rows, name, seeds) for name in names)
        difference, error = paired(first, second)
        sizes = [_parameters(known[name], claim.rows) for name in names]
        found.append(
            {
                "claim": claim.text,
                "rows": claim.rows,
                "first": names[0],
                "second": names[1],
                "goal": claim.goal,
                "seeds": len(next(iter(first.values()))),
                "points": round(100 * difference, 2),
                "standard_error": round(100 * error, 2),
                "parameters": sizes,
                "verdict": _verdict(claim, 100 * difference, 100 * error, sizes)
                if claim.rows == "adapted" or len(seeds) > 1
                else ONE_SEED,
            }
        )
    return found


def _verdict(claim: Claim, points: float, error: float, sizes: list[int]) -> str:
    if claim.parameters is not None and sizes[0] > claim.parameters * sizes[1]:
        return "no: too many parameters"
    if abs(points - claim.goal) < 2 * error:
        return "within two standard errors of the goal"
    return "yes" if points >= claim.goal else "no"


def _parameters(entry: Mapping[str, Any], rows: Rows) -> int:
    found: int = entry["adaptation_params" if rows == "adapted" else "multi_task_params"]
    return found


def _seeds(config: StudyConfig, names: Sequence[str]) -> list[int]:
    """The seeds with which all of the named variants are trained already."""
    variants = [variant for variant in config.variants if variant.name in names]
    return [
        seed
        for seed in config.train_seeds
        if all(_path(config, "train", run_name(config, v, seed)).exists() for v in variants)
    ]


def _entries(
    config: StudyConfig, rows: Rows, name: str, seeds: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """The scores by task and seed: of the few rows for adapted tasks, of training for others."""
    if rows == "adapted":
        cell: dict[str, Any] = json.loads(_path(config, "adapt", name).read_text())["held_out"]
        return cell
    (variant,) = (variant for variant in config.variants if variant.name == name)
    found: dict[str, dict[str, Any]] = {}
    for seed in seeds:
        path = _path(config, "train", run_name(config, variant, seed))
        for task, entry in json.loads(path.read_text())["scores"].items():
            if (task in config.held_out) == (rows == "zero_shot"):
                found.setdefault(task, {})[str(seed)] = entry
    return found


def _path(config: StudyConfig, kind: str, name: str) -> Path:
    return config.out / kind / f"{name}.json"


def claims_table(found: list[dict[str, Any]]) -> str:
    """All claims and their findings, as a Markdown table."""
    lines = [
        "| claim | rows | compared | goal | points | seeds | parameters | holds |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for each in found:
        share = each["parameters"][0] / max(1, each["parameters"][1])
        lines.append(
            f"| {each['claim']} | {ROWS[each['rows']]} | {each['first']} over {each['second']} "
            f"| {each['goal']:+.1f} | {each['points']:+.1f} ± {each['standard_error']:.1f} "
            f"| {each['seeds']} | {share:.3g} times | {each['verdict']} |"
        )
    return "\n".join(lines)
