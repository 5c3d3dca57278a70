"""The process that fits a task for a server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from polyrex.adapters.errors import DataError
from polyrex.adapters.files.inventory import Inventory, read_inventory
from polyrex.adapters.files.router import read_router
from polyrex.adapters.model.attach import attach, find_targets
from polyrex.adapters.model.base_model import load_base
from polyrex.adapters.spec import AdapterSpec, Granularity
from polyrex.training import fit_worker
from polyrex.training.data.batches import Example
from polyrex.training.fit_worker import FEWEST_ROWS, LOOP, FitJob, lower_layers, task_of

COLOURS = ["red", "blue", "green"]
ROWS = [{"input": f"thing {n}", "answer": COLOURS[n % 3], "options": COLOURS} for n in range(12)]


def run_worker(job: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    """The worker's status and its events."""
    with started(job) as worker:
        assert worker.stdout is not None
        events = [json.loads(line) for line in worker.stdout]
    return worker.returncode, events


def started(job: dict[str, Any]) -> subprocess.Popen[str]:
    """A worker that has been told its job; its stdin is open."""
    worker = subprocess.Popen(
        [sys.executable, "-P", "-m", "polyrex.training.fit_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(job) + "\n")
    worker.stdin.flush()
    return worker


def job(inventory: Inventory, base: Path, out: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "base": str(base),
        "inventory": str(inventory.path),
        "task": "colours",
        "instruction": "Which colour is it?",
        "rows": ROWS,
        "out": str(out),
        "dtype": "float32",
        "device": "cpu",
    }
    return values | changes


@pytest.fixture
def inventory(tiny_inventory: Path) -> Inventory:
    return read_inventory(tiny_inventory)


def test_worker_tells_every_step_and_writes_the_router(
    inventory: Inventory, tiny_base: Path, tmp_path: Path
) -> None:
    status, events = run_worker(job(inventory, tiny_base, tmp_path / "router.safetensors"))
    assert status == 0
    assert [event["event"] for event in events] == [
        "started",
        *["progress"] * LOOP.steps,
        "scored",
    ]
    assert events[0] | {"rows": 9, "held_out": 3, "device": "cpu"} == events[0]
    assert [event["step"] for event in events[1:-1]] == list(range(1, LOOP.steps + 1))
    router = read_router((tmp_path / "router.safetensors").read_bytes(), "router", inventory)
    assert router.metadata.task == "colours"
    assert router.metadata.scores["held_out"] | {"event": "scored"} == events[-1]
    assert router.metadata.provenance["rows"] == 9


def test_worker_ends_when_nobody_wants_its_result_any_more(
    inventory: Inventory, tiny_base: Path, tmp_path: Path
) -> None:
    many = [ROWS[number % len(ROWS)] for number in range(1024)]
    with started(job(inventory, tiny_base, tmp_path / "router", rows=many)) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert json.loads(worker.stdout.readline())["event"] == "started"
        worker.stdin.close()
        assert "scored" not in worker.stdout.read()
    assert worker.returncode == 1
    assert not (tmp_path / "router").exists()


def test_worker_needs_no_optional_package() -> None:
    script = (
        "import sys\n"
        "for name in ('scipy', 'matplotlib', 'gguf'):\n"
        "    sys.modules[name] = None\n"
        "import polyrex.training.fit_worker\n"
    )
    subprocess.run([sys.executable, "-P", "-c", script], check=True)


def test_worker_that_cannot_fit_says_why(
    inventory: Inventory, tiny_base: Path, tmp_path: Path
) -> None:
    few = job(inventory, tiny_base, tmp_path / "router.safetensors", rows=ROWS[:5])
    status, events = run_worker(few)
    assert status == 1
    assert events[-1]["event"] == "failed"
    assert "at least 8 rows are needed, got 5" in events[-1]["message"]
    assert not (tmp_path / "router.safetensors").exists()


@pytest.mark.parametrize(
    ("length", "budget", "granularity", "lower"),
    [(10, 1e12, "module", 0), (10, 1.0, "module", 1), (10, 1.0, "model", 0)],
    ids=["affordable", "too much", "one router"],
)
def test_layers_are_fitted_as_far_down_as_the_budget_goes(
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    budget: float,
    granularity: Granularity,
    lower: int,
) -> None:
    """Of the tiny model's two layers."""
    monkeypatch.setattr(fit_worker, "BUDGET", budget)
    model = load_base(str(tiny_base), torch.float32)
    spec = AdapterSpec("poly", rank=2, experts=2, granularity=granularity)
    examples = [Example(0, (1,) * length, (2,))]
    assert lower_layers(attach(model, spec, find_targets(model)), examples) == lower
    below = load_base(str(tiny_base), torch.float32)
    adapted = attach(below, spec, find_targets(below, r".*layers\.0\..*_proj"))
    assert lower_layers(adapted, examples) == 0


def test_every_fourth_row_is_held_out() -> None:
    task = task_of(FitJob("", "", "t", "", ROWS, ""))
    assert [row.input for row in task.rows["valid"]] == ["thing 3", "thing 7", "thing 11"]
    assert len(task.rows["train"]) == 9


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[: FEWEST_ROWS - 1], "at least 8 rows"),
        ([*ROWS, {"input": "a", "answer": "b"}], "every row has options, or none"),
    ],
    ids=["few", "mixed"],
)
def test_rows_that_make_no_task_are_refused(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        task_of(FitJob("", "", "t", "", rows, ""))
