"""What the study's report makes of its cells."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from polyrex.adapters.methods.composed import LowRank
from polyrex.adapters.model.attach import find_targets
from polyrex.adapters.model.base_model import load_base
from polyrex.adapters.model.parameter_counts import count_parameters
from polyrex.adapters.rows import Row
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.data.tasks import Split, Task
from polyrex.training.study.claims import ONE_SEED, claims_table, judge
from polyrex.training.study.plots import cosines
from polyrex.training.study.report import (
    ablation_table,
    bits,
    constant_scores,
    main_table,
    mean_of,
    mean_of_medians,
    mean_of_seeds,
    paired,
    summarise,
    task_table,
)
from polyrex.training.study.run import entry
from polyrex.training.study.variants import StudyConfig, Variant, cell

HALF, ALL, NONE = [True, False] * 50, [True] * 100, [False] * 100
POLY = AdapterSpec("poly", rank=2, experts=3)


def test_mean_takes_rows_as_independent() -> None:
    found = mean_of({"a": entry(HALF), "b": entry(ALL), "c": entry(NONE)}, ["a", "b"])
    assert found.value == 0.75
    assert found.error == pytest.approx(math.sqrt(0.25 / 100) / 2)


def test_mean_of_medians_adds_the_spread_over_seeds() -> None:
    seeds = {"0": entry(HALF), "1": entry(ALL), "2": entry(NONE)}
    found = mean_of_medians({"a": seeds})
    assert found.value == 0.5
    assert found.error == pytest.approx(math.sqrt(0.25 / 100 + 0.25 / 3))


def test_mean_of_seeds_adds_the_spread_over_them() -> None:
    trained = [{"a": entry(HALF)}, {"a": entry(ALL)}]
    found = mean_of_seeds(trained, ["a"])
    assert found.value == 0.75
    assert found.error == pytest.approx(math.sqrt(0.25 / 100 / 2 + 0.125 / 2))
    assert mean_of_seeds(trained[:1], ["a"]) == mean_of(trained[0], ["a"])


def test_paired_difference_is_surer_than_two_means() -> None:
    """Two methods that are right on the same rows, but for one."""
    better = HALF.copy()
    better[1] = True
    difference, error = paired({"a": {"0": entry(better)}}, {"a": {"0": entry(HALF)}})
    assert difference == pytest.approx(0.01)
    assert error == pytest.approx(0.01)
    assert error < mean_of({"a": entry(HALF)}, ["a"]).error


def test_what_differs_from_seed_to_seed_is_no_finding() -> None:
    """One better by a tenth, then worse by as much: nothing is known."""
    better, worse = [*[True] * 10, *HALF[10:]], [*[False] * 10, *HALF[10:]]
    first = {"a": {"0": entry(better), "1": entry(worse)}}
    second = {"a": {"0": entry(HALF), "1": entry(HALF)}}
    difference, error = paired(first, second)
    assert difference == pytest.approx(0)
    assert error >= math.sqrt(0.005 / 2)  # the variance of 0.05 and -0.05, of two


def test_claims_take_the_seeds_that_both_were_trained_with(tiny_base: Path, tmp_path: Path) -> None:
    variants = (
        Variant("lora", "lora", AdapterSpec("lora", rank=2), ("modules",)),
        Variant("mhr", "poly", AdapterSpec("mhr", rank=2, experts=2, splits=2), ("routing",)),
    )
    config = StudyConfig(
        tmp_path, tmp_path, tmp_path, targets=".*_proj", variants=variants, held_out=("new",)
    )
    rows = {"lora": NONE, "mhr": HALF, "lora-seed1": HALF, "mhr-seed1": ALL, "lora-seed2": ALL}
    for name, right in rows.items():
        scores = {"old": entry(right), "new": entry(NONE)}
        trained = cell(config, "train", name)
        trained.write_text(json.dumps({"scores": scores, "valid_loss": 1.0}))
    summary = summarise(config, load_base(str(tiny_base), torch.float32))
    assert summary["methods"]["lora"]["held_in_by_seed"] == [0, 0.5, 1]
    assert summary["methods"]["lora"]["held_in_mean"] == 0.5
    (found,) = judge(config, summary)
    assert (found["claim"], found["seeds"], found["points"]) == ("MHR beats LoRA", 2, 50)


def test_constant_answer_is_the_usual_one_or_a_guess() -> None:
    def row(answer: str, *options: str) -> Row:
        return Row("", answer, options or None)

    def task(name: str, train: list[Row], test: list[Row]) -> Task:
        rows: dict[Split, tuple[Row, ...]] = {"train": (*train,), "valid": (), "test": (*test,)}
        return Task(name, "", "rank_classification_accuracy", "held_in", "", "", rows)

    usual = [row("yes", "yes", "no")] * 3 + [row("no", "yes", "no")]
    own = [row("red", "red", "blue", "green", "black")]
    tasks = [task("usual", usual, usual), task("own", usual, own), task("said", own, [row("x")])]
    assert constant_scores(tasks, 160) == {"usual": 0.75, "own": 0.25, "said": 0}


def test_bits_are_the_rows() -> None:
    rows = [False, True, True, False, True]
    assert bits(entry(rows)) == [0, 1, 1, 0, 1]


def test_summary_counts_and_scores_what_is_finished(tiny_base: Path, tmp_path: Path) -> None:
    variants = (
        Variant("poly", "poly", POLY, ("routing", "both")),
        Variant("later", "poly", POLY, ("routing",)),
    )
    config = StudyConfig(
        tmp_path, tmp_path, tmp_path, targets=".*_proj", variants=variants, held_out=("new",)
    )
    scores = {"old": entry(HALF), "other": entry(ALL), "new": entry(NONE)}
    train = {"scores": scores, "valid_loss": 1.0}
    cell(config, "train", "poly").write_text(json.dumps(train))
    cell(config, "base").write_text(json.dumps({"scores": scores}))
    for mode, rows in (("routing", HALF), ("both", ALL)):
        adapted = {"held_out": {"new": {"0": entry(rows)}}}
        cell(config, "adapt", f"poly-{mode}").write_text(json.dumps(adapted))
    base = load_base(str(tiny_base), torch.float32)
    found = summarise(config, base)
    counts = count_parameters(POLY, find_targets(base), tasks=2)
    poly = found["methods"]["poly"]
    assert list(found["methods"]) == ["poly"]
    assert (poly["held_in_mean"], poly["zero_shot_mean"], poly["held_out_mean"]) == (0.75, 0, 1)
    assert poly["multi_task_params"] == counts.multi_task
    assert poly["mode"] == "both"
    assert (
        found["ablations"]["poly-routing"]
        | {
            "held_out_mean": 0.5,
            "adaptation_params": counts.routing_per_task,
        }
        == found["ablations"]["poly-routing"]
    )
    assert "| poly | " in main_table(found)
    assert "| poly-routing | " in ablation_table(found)
    assert "50.0 ± 5.0 |" in ablation_table(found)
    assert "| poly | both | 100.0 | 100.0 ± 0.0 |" in task_table(found)


TREX = AdapterSpec("trex", rank=2, granularity="model")
FEW, MANY = [False] * 60 + [True] * 40, ALL


@pytest.mark.parametrize(
    ("trex", "lora", "rank", "verdict"),
    [
        (MANY, FEW, 64, "yes"),
        (FEW, MANY, 64, "no"),
        (HALF, HALF[::-1], 64, "within two standard errors of the goal"),
        (MANY, FEW, 1, "no: too many parameters"),
    ],
    ids=["yes", "no", "unsure", "parameters"],
)
def test_claims_are_judged_by_paired_differences(
    tiny_base: Path, tmp_path: Path, trex: list[bool], lora: list[bool], rank: int, verdict: str
) -> None:
    variants = (
        Variant("lora", "lora", AdapterSpec("lora", rank=rank), ("modules",)),
        Variant("trex-mix-intuition", "trex", TREX, ("routing",), routes_tasks=False),
    )
    config = StudyConfig(
        tmp_path, tmp_path, tmp_path, targets=".*_proj", variants=variants, held_out=("new",)
    )
    for variant, right in zip(variants, (lora, trex), strict=True):
        scores = {"old": entry(right), "new": entry(HALF)}
        for name in (variant.name, f"{variant.name}-seed1"):
            trained = cell(config, "train", name)
            trained.write_text(json.dumps({"scores": scores, "valid_loss": 1.0}))
        adapted = cell(config, "adapt", f"{variant.name}-{variant.modes[0]}")
        adapted.write_text(json.dumps({"held_out": {"new": {"0": entry(right)}}}))
    found = judge(config, summarise(config, load_base(str(tiny_base), torch.float32)))
    assert [each["rows"] for each in found] == ["adapted", "held_in", "zero_shot"]
    best, held_in, zero_shot = found
    assert best["first"] == "trex-mix-intuition-routing"
    assert held_in["points"] == best["points"] == pytest.approx(sum(trex) - sum(lora))
    assert held_in["verdict"] == verdict
    assert zero_shot["points"] == 0
    assert f"| {held_in['points']:+.1f} ± " in claims_table(found)
    cell(config, "train", "lora-seed1").unlink()
    once = judge(config, summarise(config, load_base(str(tiny_base), torch.float32)))
    assert [each["verdict"] == ONE_SEED for each in once] == [False, True, True]


def test_cosines_of_experts_are_those_of_their_matrices() -> None:
    experts = LowRank(torch.randn(3, 2, 5), torch.randn(3, 2, 4))
    matrices = (experts.a.transpose(1, 2) @ experts.b).flatten(1)
    unit = torch.nn.functional.normalize(matrices, dim=-1)
    torch.testing.assert_close(cosines(experts), unit @ unit.T)
