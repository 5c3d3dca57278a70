"""The study's summary of its cells (`study.json`), and the tables of the papers.

Accuracies are shares of test rows. A held_out score is the mean over tasks of each task's median
over seeds; a held_in score is the mean over tasks and over the seeds of training. Standard errors
take rows as independent and include the spread over seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyrex.adapters.model.attach import find_targets
from polyrex.adapters.model.parameter_counts import ParameterCounts, abbreviate, count_parameters
from polyrex.training.adapt import AdaptMode
from polyrex.training.data.tasks import Task, load_tasks

from .variants import StudyConfig, Variant, run_name

MODES: tuple[AdaptMode, ...] = ("both", "routing", "modules", "token-routers")
"""The main table shows a variant in the first of these modes that it has."""


@dataclass(frozen=True)
class Mean:
    """A mean of tasks' scores with its standard error."""

    value: float
    error: float
    by_task: Mapping[str, float]


def mean_of(scores: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> Mean:
    """The mean of one score for each task."""
    by_task = {name: scores[name]["score"] for name in names}
    variance = sum(p * (1 - p) / scores[name]["rows"] for name, p in by_task.items())
    return Mean(statistics.mean(by_task.values()), math.sqrt(variance) / len(names), by_task)


def mean_of_seeds(trained: Sequence[Mapping[str, Mapping[str, Any]]], names: Sequence[str]) -> Mean:
    """The mean of one score for each task and seed of training, with the spread over seeds in the
    error. A single seed has no spread, so its error lacks it.
    """
    means = [mean_of(scores, names) for scores in trained]
    variance = statistics.mean(mean.error**2 for mean in means)
    if len(means) > 1:
        variance += statistics.variance(mean.value for mean in means) / len(means)
    by_task = {name: statistics.mean(mean.by_task[name] for mean in means) for name in names}
    return Mean(statistics.mean(by_task.values()), math.sqrt(variance), by_task)


def mean_of_medians(held_out: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Mean:
    """The mean over tasks of each task's median over seeds, with their spread in the error."""
    by_task = {
        task: statistics.median(seed["score"] for seed in seeds.values())
        for task, seeds in held_out.items()
    }
    rows = {task: next(iter(seeds.values()))["rows"] for task, seeds in held_out.items()}
    variance = sum(p * (1 - p) / rows[task] for task, p in by_task.items()) / len(by_task) ** 2
    names = next(iter(held_out.values())).keys()
    means = [statistics.mean(seeds[name]["score"] for seeds in held_out.values()) for name in names]
    if len(means) > 1:
        variance += statistics.variance(means) / len(means)
    return Mean(statistics.mean(by_task.values()), math.sqrt(variance), by_task)


def paired(
    first: Mapping[str, Mapping[str, Mapping[str, Any]]],
    second: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> tuple[float, float]:
    """The mean difference of two variants over seeds and tasks, with its standard error.

    Both answered the same rows, so differences are taken row by row, which cancels how hard a row
    is. The spread over seeds is added to the error.
    """
    differences, variance = [], 0.0
    by_seed: dict[str, list[float]] = {}
    for task, seeds in first.items():
        rows = [
            statistics.mean(row)
            for row in zip(
                *(
                    [a - b for a, b in zip(bits(one), bits(second[task][seed]), strict=True)]
                    for seed, one in seeds.items()
                ),
                strict=True,
            )
        ]
        differences.append(statistics.mean(rows))
        variance += statistics.variance(rows) / len(rows) / len(first) ** 2
        for seed, one in seeds.items():
            by_seed.setdefault(seed, []).append(one["score"] - second[task][seed]["score"])
    means = [statistics.mean(each) for each in by_seed.values()]
    if len(means) > 1:
        variance += statistics.variance(means) / len(means)
    return statistics.mean(differences), math.sqrt(variance)


def bits(entry: Mapping[str, Any]) -> list[int]:
    """Whether each row was answered correctly, from the first row on."""
    value = int(entry["right"], 16)
    return [value >> i & 1 for i in range(entry["rows"])]


def constant_scores(tasks: Sequence[Task], rows: int) -> dict[str, float]:
    """By task, the score on the first `rows` test rows of an answer that ignores the input: the
    most frequent answer of the train rows, or a random option, whichever is better."""
    found = {}
    for task in tasks:
        test = task.rows["test"][:rows]
        usual = Counter(row.answer for row in task.rows["train"]).most_common(1)[0][0]
        frequent = statistics.mean(row.answer == usual for row in test)
        guessed = statistics.mean(1 / len(row.options) if row.options else 0 for row in test)
        found[task.name] = round(max(frequent, guessed), 4)
    return found


def adapted_parameters(counts: ParameterCounts, mode: AdaptMode) -> int:
    """The number of parameters that a mode of adaptation trains."""
    return {
        "routing": counts.routing_per_task,
        "token-routers": counts.token_routers,
        "modules": counts.experts,
        "both": counts.experts + counts.routing_per_task,
    }[mode]


def summarise(config: StudyConfig, base: Any) -> dict[str, Any]:
    """A summary of all that is finished, by variant; parameters are counted on the `base` model."""
    targets = find_targets(base, config.targets)
    methods, ablations = {}, {}
    for variant in config.variants:
        trained = [
            found
            for seed in config.seeds_of(variant)
            if (found := _read(config.out / "train" / f"{run_name(config, variant, seed)}.json"))
        ]
        if not trained:
            continue
        held_in = [name for name in trained[0]["scores"] if name not in config.held_out]
        counts = count_parameters(variant.spec, targets, len(held_in))
        modes = {
            mode: found["held_out"]
            for mode in variant.modes
            if (found := _read(config.out / "adapt" / f"{variant.name}-{mode}.json"))
            and len(found["held_out"]) == len(config.held_out)
        }
        entry = _trained(trained, held_in, config.held_out, counts, variant)
        main = next((mode for mode in MODES if mode in modes), None)
        for mode, held_out in modes.items():
            mean = mean_of_medians(held_out)
            adapted = {
                "variant": variant.name,
                "mode": mode,
                "held_out_mean": round(mean.value, 4),
                "standard_error": round(mean.error, 4),
                "adaptation_params": adapted_parameters(counts, mode),
                "by_task": {task: round(score, 4) for task, score in mean.by_task.items()},
            }
            ablations[f"{variant.name}-{mode}"] = adapted
            if mode == main:
                entry |= adapted
        methods[variant.name] = entry
    base_scores = _read(config.out / "base.json")
    return {
        "methods": methods,
        "ablations": ablations,
        "base": {} if base_scores is None else _base(base_scores["scores"], config.held_out),
    }


def _trained(
    trained: Sequence[Mapping[str, Any]],
    held_in: Sequence[str],
    held_out: Sequence[str],
    counts: ParameterCounts,
    variant: Variant,
) -> dict[str, Any]:
    scores = [each["scores"] for each in trained]
    before, zero_shot = mean_of_seeds(scores, held_in), mean_of_seeds(scores, held_out)
    return {
        "held_in_mean": round(before.value, 4),
        "held_in_standard_error": round(before.error, 4),
        "held_in_by_seed": [round(mean_of(each, held_in).value, 4) for each in scores],
        "zero_shot_mean": round(zero_shot.value, 4),
        "zero_shot_standard_error": round(zero_shot.error, 4),
        "valid_loss": round(statistics.mean(each["valid_loss"] for each in trained), 4),
        "multi_task_params": counts.multi_task if variant.routes_tasks else counts.experts,
    }


def constant_answers(config: StudyConfig) -> dict[str, Any]:
    """The `constant_scores` of the study's tasks, and their means."""
    held_in = constant_scores(load_tasks(config.data, role="held_in"), config.test_rows)
    held_out = constant_scores(load_tasks(config.data, config.held_out), config.test_rows)
    return {
        "held_in_mean": round(statistics.mean(held_in.values()), 4),
        "held_out_mean": round(statistics.mean(held_out.values()), 4),
        "by_task": held_in | held_out,
    }


def _base(scores: Mapping[str, Any], held_out: Sequence[str]) -> dict[str, float]:
    held_in = [name for name in scores if name not in held_out]
    return {
        "held_in_mean": round(mean_of(scores, held_in).value, 4),
        "zero_shot_mean": round(mean_of(scores, held_out).value, 4),
    }


def main_table(summary: Mapping[str, Any]) -> str:
    """A row for each variant: parameters, held_in accuracy, and held_out accuracy before and after
    adaptation."""
    lines = [
        "| method | trained | seeds | held_in | held_out, not adapted | adapted | parameters "
        "| held_out |",
        "|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    if constant := summary.get("constant"):
        lines.append(
            f"| a constant answer | | | {_percent(constant['held_in_mean'])} | | | "
            f"| {_percent(constant['held_out_mean'])} |"
        )
    if base := summary["base"]:
        lines.append(
            f"| base model | | | {_percent(base['held_in_mean'])} | "
            f"{_percent(base['zero_shot_mean'])} | | | |"
        )
    for name, entry in summary["methods"].items():
        adapted = "| | | |"
        if "mode" in entry:
            adapted = (
                f"| {entry['mode']} | {abbreviate(entry['adaptation_params'])} "
                f"| {_with_error(entry, 'held_out_mean', 'standard_error')} |"
            )
        lines.append(
            f"| {name} | {abbreviate(entry['multi_task_params'])} "
            f"| {len(entry['held_in_by_seed'])} "
            f"| {_with_error(entry, 'held_in_mean', 'held_in_standard_error')} "
            f"| {_with_error(entry, 'zero_shot_mean', 'zero_shot_standard_error')} {adapted}"
        )
    return "\n".join(lines)


def task_table(summary: Mapping[str, Any]) -> str:
    """The median over seeds of each held_out task, in each variant's main mode."""
    adapted = {n: entry for n, entry in summary["methods"].items() if "mode" in entry}
    tasks = list(next(iter(adapted.values()), {"by_task": {}})["by_task"])
    lines = [
        f"| method | adapted | {' | '.join(tasks)} | mean |",
        f"|---|---|{'---:|' * (len(tasks) + 1)}",
    ]
    if constant := summary.get("constant"):
        scores = " | ".join(_percent(constant["by_task"][task]) for task in tasks)
        lines.append(f"| a constant answer | | {scores} | {_percent(constant['held_out_mean'])} |")
    for name, entry in adapted.items():
        scores = " | ".join(_percent(entry["by_task"][task]) for task in tasks)
        mean = _with_error(entry, "held_out_mean", "standard_error")
        lines.append(f"| {name} | {entry['mode']} | {scores} | {mean} |")
    return "\n".join(lines)


def ablation_table(summary: Mapping[str, Any]) -> str:
    """A row for each variant and mode of adaptation."""
    lines = ["| method and mode | adapted parameters | held_out |", "|---|---:|---:|"]
    for name, entry in summary["ablations"].items():
        score = _with_error(entry, "held_out_mean", "standard_error")
        lines.append(f"| {name} | {abbreviate(entry['adaptation_params'])} | {score} |")
    return "\n".join(lines)


def _with_error(entry: Mapping[str, Any], value: str, error: str) -> str:
    return f"{_percent(entry[value])} ± {_percent(entry[error])}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None
