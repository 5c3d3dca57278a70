"""`make gpu` goes through all parts on the CPU, so that time on a GPU is not spent on a typo."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import predict
from bench.gpu.__main__ import PARTS, parts_of, run_part
from bench.gpu.base_pieces import PACKAGE, join_pieces, write_pieces
from bench.gpu.measured import LORA, LORAS, decode_key, end_to_end_key, kernel_key, over_lora
from bench.gpu.measuring.apart import Apart
from bench.gpu.measuring.timing import COLD_BYTES, MOST_COPIES, copies_of
from bench.gpu.part import Part
from bench.gpu.parts.engine import Sizes, decode_steps, jobs
from bench.gpu.parts.kernels import DISTINCT, SWEEP, Mix, stages
from bench.gpu.parts.training import contenders
from bench.gpu.parts.triton_tests import caught, outcomes
from bench.gpu.predict import predictions
from bench.gpu.table import page, section
from bench.gpu.workspace import PACKAGES, prepare

TESTS = Path(__file__).parents[2]
METHODS = {"tensorpoly-1", "tensorpoly-2", "trex-static"}
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def dry_run(part: str, folder: Path) -> dict[str, Any]:
    """Run the command with one part; what it wrote."""
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--parts", part, "--budget", "300"]
    command += [f"--{name}={folder / name}" for name in ("out", "work", "bundle")]
    environment = os.environ | {
        "PYTHONPATH": str(TESTS),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((folder / "out" / f"{part}.json").read_text())
    assert found["finished"]
    assert found["dry_run"]
    assert found["machine"]["torch"]
    readme = (folder / "out" / "README.md").read_text()
    assert f"## {part}" in readme
    assert "the figures mean nothing" in readme
    return found


@needs_triton
def test_tests_part_sees_a_planted_defect(tmp_path: Path) -> None:
    figures = dry_run("tests", tmp_path)["figures"]
    assert figures["tests"]["passed"] > 0
    assert figures["tests"]["failed"] == []
    assert figures["planted defect"]["caught"]


@needs_triton
def test_kernels_part_measures_every_method_and_baseline(tmp_path: Path) -> None:
    found = dry_run("kernels", tmp_path)
    key = kernel_key("8B qk", 3, SWEEP[0].name)
    assert found["figures"][key].keys() >= METHODS | {"frozen_us"}
    loras = found["figures"][f"{key}{LORAS}"]
    assert loras.keys() >= {"lora_gathered_us", "lora_one_for_all_us"}
    assert ("lora_vllm_us" in loras) == (find_spec("vllm") is not None)
    assert f"| {loras['lora_gathered_us']} |" in section(found)


def test_engine_part_measures_every_method_with_and_without_graphs(tmp_path: Path) -> None:
    found = dry_run("engine", tmp_path)
    figures = found["figures"]
    assert found["left_out"] == {}
    for method in METHODS:
        for graphs in (True, False):
            key = decode_key(method, 4, graphs=graphs)
            assert figures[key].keys() >= {"ms_a_step", "tokens_per_second", "4 of base"}
            assert figures[f"{key} of 4 tasks"].keys() == {"kernels", "launches", "device_ms"}
        assert figures[decode_key(method, 4)].keys() >= {"1 of base"}
        assert figures[end_to_end_key(method, 4)].keys() == {"tokens_per_second", "4 of base"}
    assert figures[decode_key(LORA, 4)]["tokens_per_second"].keys() == {"0", "4"}
    assert over_lora({"engine": figures}, "tensorpoly-2", 4)


def test_training_part_compares_with_peft(tmp_path: Path) -> None:
    found = dry_run("training", tmp_path)
    assert found["left_out"] == {}
    assert found["figures"]["compared"]["poly"].keys() >= {"of_peft_poly", "of_peft_lora"}


def test_study_part_trains_and_scores_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    found = dry_run("study", tmp_path)
    (figures,) = found["figures"].values()
    assert figures["steps"] == 2
    assert figures["scores"]["held_in rank_classification_accuracy"]["tasks"] == 2
    assert list((tmp_path / "work" / "study").glob("*/checkpoint.safetensors"))


def test_figures_are_on_disk_before_a_part_ends(tmp_path: Path) -> None:
    options = argparse.Namespace(dry_run=False, out=tmp_path, bundle=None, work=None, seconds=60)
    part = Part("engine", options)

    def fail() -> dict[str, Any]:
        raise RuntimeError("out of memory\nwith a long explanation")

    part.add("first", {"kernels": 1, "launches": 2, "device_ms": 3.0})
    part.try_to("second", fail, least=0)
    part.try_to("third", lambda: {"never": 0}, least=61)
    found = json.loads((tmp_path / "engine.json").read_text())
    assert list(found["figures"]) == ["first"]
    assert found["left_out"] == {"second": "RuntimeError: out of memory", "third": "no time left"}
    assert not found["finished"]
    assert "cut short" in page(tmp_path)


def die(_: Part) -> None:
    """What an error of the device may come to."""
    signal.raise_signal(signal.SIGKILL)


def test_a_process_that_dies_costs_its_own_figure_alone(tmp_path: Path) -> None:
    options = argparse.Namespace(dry_run=True, out=tmp_path, bundle=None, work=None, seconds=60)
    part = Part("engine", options)
    dying = Apart(part, "dies", die)
    adds = Apart(part, "adds", methodcaller("add", "found", {"kernels": 1}))
    never = Apart(part, "never", methodcaller("add", "late", {}))
    part.add("before", {})
    with pytest.raises(RuntimeError, match="dies"):
        dying.run(least=0)
    adds.run(least=0)
    never.run(least=61)
    found = json.loads((tmp_path / "engine.json").read_text())
    assert found["figures"] == {"before": {}, "found": {"kernels": 1}}
    assert found["left_out"] == {
        "dies": f"its process ended with status {-signal.SIGKILL}",
        "never": "no time left",
    }


def test_a_part_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sleeps.py").write_text("import time; time.sleep(600)")
    monkeypatch.setattr("bench.gpu.__main__.GRACE", 0)
    command = [sys.executable, str(tmp_path / "sleeps.py")]
    monkeypatch.setattr("bench.gpu.__main__.command_of", lambda _: command)
    assert run_part("engine", 1, [], dict(os.environ)) < 0


def test_parts_run_in_their_order_and_unknown_ones_are_refused() -> None:
    assert parts_of("study,tests") == ["tests", "study"]
    with pytest.raises(argparse.ArgumentTypeError, match="no part kernel; there are tests, "):
        parts_of("kernel")


def test_a_checkout_is_importable_without_being_installed(tmp_path: Path) -> None:
    environment = prepare(tmp_path, tmp_path / "no-bundle")
    assert environment["PYTHONPATH"].startswith(f"{tmp_path}{os.pathsep}{TESTS}")
    assert {path.name for path in (tmp_path / "polyrex").iterdir()} == set(PACKAGES)


def test_pieces_of_the_base_model_are_joined_to_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.gpu.base_pieces.PIECE_BYTES", 400)
    monkeypatch.setattr(sys, "path", [])
    data = bytes(range(250)) * 4
    (tmp_path / "model.gguf").write_bytes(data)
    pieces = write_pieces(tmp_path / "model.gguf", tmp_path)
    assert [piece.stat().st_size for piece in pieces] == [334, 334, 332]
    joined = join_pieces(tmp_path, tmp_path / "work")
    assert joined is not None
    assert joined.read_bytes() == data
    assert (joined.parent.name, sys.path) == (PACKAGE, [str(tmp_path / "work" / "base")])
    pieces[1].write_bytes(data[:334])
    with pytest.raises(ValueError, match="are not those of"):
        join_pieces(tmp_path, tmp_path / "other")
    pieces[1].unlink()
    with pytest.raises(ValueError, match="piece-2 missing"):
        join_pieces(tmp_path, tmp_path / "other")


def test_mixes_have_the_tasks_that_they_say() -> None:
    assert DISTINCT.rows(32) == list(range(32))
    assert len(set(DISTINCT.rows(2048))) == 1024
    assert set(Mix("identical", tasks=1).rows(8)) == {0}
    assert len(set(Mix("of 32 tasks", tasks=32).rows(2048))) == 32
    uniform, zipf = (len(set(mix.rows(2048))) for mix in SWEEP[:2])
    assert 1024 > uniform > 1.5 * zipf


def test_what_goals_are_set_for_is_measured_first(tmp_path: Path) -> None:
    first = stages(dry=False)[0]
    assert (first.tokens, first.mixes, first.loras) == ((32, 2048), (DISTINCT,), False)
    assert {name.split()[0] for name in first.layers} == {"8B"}
    assert contenders(dry=False)[:4] == ["poly", "peft poly"] * 2
    options = argparse.Namespace(dry_run=False, out=tmp_path, bundle=None, work=None, seconds=60)
    in_turn = list(jobs(Sizes.of(Part("engine", options))))
    assert {job.measure for job in in_turn[:4]} == {decode_steps}
    assert {job.name for job in in_turn[:4]} == METHODS | {LORA}
    assert [job.graphs for job in in_turn] == [True] * 7 + [False] * 3


def test_outcomes_of_tests_are_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite><testcase name='a'/><testcase name='b'><failure/></testcase>"
        "<testcase name='c'><skipped/></testcase></testsuite></testsuites>"
    )
    assert outcomes(report) == {"passed": 1, "failure": 1, "skipped": 1, "failed": ["b"]}
    assert not caught(outcomes(report))["caught"]  # one passed, with the defect in place
    assert caught({"failure": 3, "failed": ["a"]})["caught"]
    assert not caught({"failed": []})["caught"]


def test_weights_that_take_turns_do_not_fit_in_a_cache() -> None:
    assert copies_of(COLD_BYTES // 4, dry=False) == 4
    assert copies_of(COLD_BYTES * 4, dry=False) == 2
    assert copies_of(1, dry=False) == MOST_COPIES


def test_every_goal_has_a_prediction() -> None:
    text = "\n".join(f"{row.figure} {row.goal}" for row in predictions())
    for goal in ("T=32", "T=2048", "32 distinct", "1024 distinct", "256 distinct", "training"):
        assert goal in text


def test_what_was_measured_stands_beside_every_kind_of_prediction() -> None:
    rate = {"tokens_per_second": {"0": 400.0, "256": 300.0}, "1024 of base": 0.93}
    layer = {"layer_us": 31.5, "layer_of_roofline": 0.81}
    results: dict[str, dict[str, Any]] = {
        "kernels": {"8B qkv T=32 distinct": dict.fromkeys(METHODS, layer)},
        "engine": {
            decode_key("trex-static", 1024): rate,
            decode_key("trex-static", 256): rate,
            decode_key(LORA, 256): {"tokens_per_second": {"256": 100.0}},
            end_to_end_key("trex-static", 1024): {"1024 of base": 0.91},
        },
        "training": {"compared": {"poly": {"of_peft_poly": 4.2}}},
    }
    found = {row.figure: row.measured(results) for row in predictions() if "trex" in row.figure}
    assert found["8B qkv, T=32, trex-static: layer of the roofline"] == "0.81: 31.5 µs"
    assert found["8B o, T=32, trex-static: layer of the roofline"] == ""
    assert found["engine, 1024 distinct tasks, trex-static: of no adapters"] == (
        "0.93, end to end 0.91"
    )
    assert found["engine, 256 distinct tasks, trex-static: of batched LoRA in PyTorch"] == "3.00"
    assert "| 4.2 | 1.5 |" in predict.table(results)


def test_every_part_has_a_module() -> None:
    assert {path.stem for path in (TESTS / "bench" / "gpu" / "parts").glob("*.py")} == {
        module for module, _ in PARTS.values()
    }
