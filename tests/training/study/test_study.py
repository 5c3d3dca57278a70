"""The comparison study, whole, on the tiny model; and what its cells promise."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from polyrex.adapters.errors import DataError
from polyrex.adapters.model.attach import find_targets
from polyrex.adapters.model.base_model import load_base
from polyrex.adapters.model.parameter_counts import count_parameters
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.loop.run import LoopConfig, StepRecord
from polyrex.training.study import run as study
from polyrex.training.study.plots import draw
from polyrex.training.study.report import constant_answers, main_table, summarise
from polyrex.training.study.router_watch import RouterWatch
from polyrex.training.study.search import best_rates, search_rates, train_adapters
from polyrex.training.study.setup import Bench
from polyrex.training.study.variants import VARIANTS, StudyConfig, Variant, cell

UPPER = r"model\.layers\.1\..*_proj"
LOOP = LoopConfig(steps=4, batch_rows=4, warmup=1, sample_routing=False, checkpoint_every=2)
INTUITION = AdapterSpec("trex", rank=2, granularity="model", intuition=3)
SMALL = (
    Variant("lora", "lora", AdapterSpec("lora", rank=2), ("modules",)),
    Variant("poly", "poly", AdapterSpec("poly", rank=2, experts=3), ("routing", "both")),
    Variant("molora", "molora", AdapterSpec("molora", rank=2, experts=3), ("token-routers",)),
    Variant("trex-intuition", "trex", INTUITION, ("routing",), routes_tasks=False),
)


@pytest.fixture(scope="module")
def config(
    tiny_base: Path, rows_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> StudyConfig:
    """A study of four variants, finished."""
    folder: Path = tmp_path_factory.mktemp("study")
    config = StudyConfig(
        rows_folder,
        folder / "out",
        folder / "work",
        base=str(tiny_base),
        targets=UPPER,
        lower_layers=1,
        dtype="float32",
        variants=SMALL,
        held_out=("other_colour",),
        searched=("other_colour",),
        rows=4,
        seeds=(0, 1),
        repeated=("lora",),
        train_seeds=(0, 1),
        search=LOOP,
        train=LOOP,
        adapt=replace(LOOP, steps=2),
        workers=1,
    )
    Bench.open(config).fill_caches()
    for variant in SMALL:
        search_rates(config, variant)
        study.run_variant(config, variant)
    study.train_variant(config, SMALL[0], 1)
    return config


def found(config: StudyConfig, *names: str) -> dict[str, object]:
    values: dict[str, object] = json.loads(cell(config, *names).read_text())
    return values


def test_every_variant_is_trained_scored_and_adapted(config: StudyConfig) -> None:
    for variant in SMALL:
        scores = found(config, "train", variant.name)["scores"]
        assert isinstance(scores, dict)
        assert set(scores) == {"colour", "shout", "other_colour"}
        for mode in variant.modes:
            adapted = found(config, "adapt", f"{variant.name}-{mode}")["held_out"]
            assert isinstance(adapted, dict)
            assert set(adapted["other_colour"]) == {"0", "1"}


@pytest.mark.parametrize("variant", SMALL, ids=lambda v: v.name)
def test_counts_are_what_the_optimiser_holds(config: StudyConfig, variant: Variant) -> None:
    held = found(config, "train", variant.name)["parameters"]
    assert isinstance(held, dict)
    targets = find_targets(load_base(config.base, torch.float32), UPPER)
    counts = count_parameters(variant.spec, targets, tasks=2)
    routing = 2 * counts.routing_per_task if variant.routes_tasks else 0
    assert held["experts"] + held["gates"] + held["token_routers"] == counts.experts
    assert held["token_routers"] == counts.token_routers
    assert held["routing"] == routing


def test_killed_run_ends_with_the_same_cells(
    config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after training; the second start takes up the checkpoint, and only scores."""
    variant = SMALL[1]
    again = replace(config, out=tmp_path / "out", work=tmp_path / "work")
    Bench.open(again).fill_caches()
    for name in ("poly", "poly-routing"):
        cell(again, "search", name).write_text(cell(config, "search", name).read_text())

    class Killed(Exception):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(study, "score_tasks", killed)
        with pytest.raises(Killed):
            study.run_variant(again, variant)
    study.run_variant(again, variant)
    for names in (("train", "poly"), ("adapt", "poly-routing"), ("adapt", "poly-both")):
        first, second = found(config, *names), found(again, *names)
        for record in (first, second):
            record.pop("tokens_per_second", None)
            record.pop("commit")
        assert first == second


def test_a_lost_inventory_takes_what_was_begun_with_it(config: StudyConfig, tmp_path: Path) -> None:
    variant = SMALL[0]
    again = replace(config, out=tmp_path / "out", work=tmp_path / "work")
    Bench.open(again).fill_caches()
    for names in (("search", "lora"), ("train", "lora"), ("search", "adapt-lora-modules")):
        cell(again, *names).write_text(cell(config, *names).read_text())
    begun: dict[str, dict[str, object]] = {"held_out": {"of another inventory": {}}}
    cell(again, "adapt", "lora-modules").write_text(json.dumps(begun))
    study.run_variant(again, variant)
    assert list(found(again, "adapt", "lora-modules")["held_out"]) == ["other_colour"]  # type: ignore[call-overload]


def test_report_draws_what_was_found(config: StudyConfig) -> None:
    summary = summarise(config, load_base(config.base, torch.float32))
    summary["constant"] = constant_answers(config)
    draw(summary, config.out, config.work, "poly")
    drawn = {path.name for path in config.out.glob("*.png")}
    names = ("accuracy", "routing", "experts", "tasks", "convergence", "intuition")
    assert drawn == {f"{name}.png" for name in names}
    assert "a constant answer" in main_table(summary)


def test_another_seed_is_another_training(config: StudyConfig) -> None:
    first, second = (found(config, "train", name) for name in ("lora", "lora-seed1"))
    assert first["parameters"] == second["parameters"]
    assert first["valid_loss"] != second["valid_loss"]
    methods = summarise(config, load_base(config.base, torch.float32))["methods"]
    assert [len(entry["held_in_by_seed"]) for entry in methods.values()] == [2, 1, 1, 1]


def test_token_routers_are_watched_through_an_interruption(
    config: StudyConfig, tmp_path: Path
) -> None:
    variant = SMALL[2]

    class Killed(Exception):
        pass

    def watched(name: str, killed_at: int | None = None) -> dict[str, list[float]]:
        bench = Bench.open(config)
        model = bench.fresh(variant)
        rows = bench.examples("train")
        probe = model.collate(rows[:2], 0)
        watch = RouterWatch(model, probe, tmp_path / f"{name}.routers", every=1)

        def progress(record: StepRecord) -> None:
            watch(record)
            if record.step == killed_at:
                raise Killed

        train_adapters(bench, model, variant, rows, LOOP, tmp_path / name, progress)
        return watch.curve()

    with pytest.raises(Killed):
        watched("halves", killed_at=2)
    whole = watched("whole")
    assert watched("halves") == whole
    assert whole["steps"] == [0, 1, 2, 3, 4]
    assert whole["distance"][-1] == 0 < whole["distance"][0]
    assert all(0 < each <= 1 for each in whole["entropy"])


def test_cells_of_another_study_are_not_gone_on_with(config: StudyConfig, tmp_path: Path) -> None:
    mine = replace(config, out=tmp_path)
    bench = Bench.open(mine)
    study.check_plan(mine, bench)
    study.check_plan(mine, bench)
    longer = replace(mine, train=replace(LOOP, steps=9))
    with pytest.raises(DataError, match=r"another study \(loops differ\)"):
        study.check_plan(longer, bench)


def test_search_ends_once_a_rate_does_worse(config: StudyConfig) -> None:
    tried = found(config, "search", "lora")["tried"]
    assert isinstance(tried, list)
    losses = [entry["valid_loss"] for entry in tried]
    assert losses[:-1] == sorted(losses[:-1], reverse=True)
    best = best_rates(config, SMALL[0])
    assert best.experts == tried[losses.index(min(losses))]["rates"]["experts"]


def test_score_keeps_one_bit_a_row() -> None:
    assert study.entry([True, False, True, True]) == {"score": 0.75, "rows": 4, "right": "d"}


def test_names_of_variants_are_their_own() -> None:
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)


def test_workers_end_with_a_study_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, os, pathlib, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from polyrex.training.study import run, variants\n"
        "if __name__ == '__main__':\n"
        "    config = variants.StudyConfig(*3 * [pathlib.Path()])\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    pool = ProcessPoolExecutor(1, context, run._start_worker, (config,))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 600).result()\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as main:
        assert main.stdout is not None
        worker = psutil.Process(int(main.stdout.readline()))
        assert worker.is_running()
        main.kill()
        worker.wait(60)
    assert not worker.is_running()
