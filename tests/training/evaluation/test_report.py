"""The report on many tasks' scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from polyrex.adapters.errors import SpecError
from polyrex.adapters.files.bundle import Bundle, NewRouter, write_bundle
from polyrex.adapters.files.inventory import load_experts, read_inventory
from polyrex.adapters.model.base_model import load_base, torch_dtype
from polyrex.training.evaluation.evaluate import Score
from polyrex.training.evaluation.report import TaskReport, Verdict, evaluate_tasks, summary, table


def scored(base: float, adapted: float, rows: int = 400) -> TaskReport:
    return TaskReport(
        "t", "held_in", Score("exact_match", rows, base), Score("exact_match", rows, adapted)
    )


@pytest.mark.parametrize(
    ("base", "adapted", "rows", "verdict"),
    [
        (0.5, 0.73, 400, "better"),
        (0.73, 0.5, 400, "worse"),
        (0.5, 0.55, 400, "within two standard errors"),
        (0.55, 0.5, 400, "within two standard errors"),
        (0.73, 0.5, 8, "within two standard errors"),
        (1.0, 1.0, 400, "within two standard errors"),
    ],
)
def test_verdict_is_better_worse_or_unsure(
    base: float, adapted: float, rows: int, verdict: Verdict
) -> None:
    assert scored(base, adapted, rows).verdict == verdict


def test_table_says_of_each_task_whether_it_is_better_or_worse() -> None:
    reports = [scored(0.2, 0.8), scored(0.73, 0.5), scored(0.5, 0.52)]
    gains = [line.split(" | ")[-1] for line in table(reports).splitlines()[2:]]
    assert gains == ["+60.0 |", "-23.0 (worse) |", "+2.0 (within two standard errors) |"]


def test_summary_counts_the_better_and_the_worse() -> None:
    found = summary([scored(0.2, 0.8), scored(0.73, 0.5), scored(0.5, 0.52), scored(0.9, 0.1)])
    assert (found["improved_tasks"], found["worse_tasks"]) == (1, 2)
    assert found["held_in exact_match"]["tasks"] == 4


@pytest.fixture
def bundle(tiny_inventory: Path, tiny_base: Path, tmp_path: Path) -> Bundle:
    """A bundle with one router."""
    adapted = load_experts(
        read_inventory(tiny_inventory), load_base(str(tiny_base), torch_dtype("float32"))
    )
    router = NewRouter(torch.zeros(adapted.routing_shape()))
    write_bundle(tmp_path / "bundle", adapted, {"colour": router})
    return Bundle.read(tmp_path / "bundle")


def evaluated(bundle: Bundle, rows: Path, out: Path, base: Path, dtype: str) -> TaskReport:
    """The report on the bundle's one task."""
    inventory = bundle.inventory.path
    (report,) = evaluate_tasks(rows, inventory, out, base=str(base), dtype=dtype)
    return report


def test_record_says_of_each_task_whether_it_improved(
    bundle: Bundle, tiny_base: Path, rows_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores.json"
    report = evaluated(bundle, rows_folder, out, tiny_base, "float32")
    entry = json.loads(out.read_text())["tasks"]["colour"]
    assert entry["verdict"] == report.verdict
    assert entry["improved"] is (report.verdict == "better")


@pytest.mark.parametrize(
    ("dtype", "quantize", "kept"),
    [("float32", None, True), ("bfloat16", None, False), ("float32", "4bit", False)],
)
def test_base_scores_are_kept_for_the_same_numbers_alone(
    bundle: Bundle,
    tiny_base: Path,
    rows_folder: Path,
    tmp_path: Path,
    dtype: str,
    quantize: str | None,
    kept: bool,
) -> None:
    out = tmp_path / "scores.json"
    first = evaluated(bundle, rows_folder, out, tiny_base, "float32")
    record = json.loads(out.read_text())
    record["tasks"]["colour"]["base"] = 0.123  # so that it is seen whether it is kept
    out.write_text(json.dumps(record | {"dtype": dtype, "quantize": quantize}))
    again = evaluated(bundle, rows_folder, out, tiny_base, "float32")
    assert again.base.value == (0.123 if kept else first.base.value)


def test_dtype_of_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SpecError, match="one of float32, bfloat16, float16, got 'float8'"):
        torch_dtype("float8")
