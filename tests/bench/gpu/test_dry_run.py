"""`make gpu` goes through all parts on the CPU, so that time on a GPU is not spent on a typo."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.__main__ import PARTS, parts_of, run_part
from bench.gpu.base_pieces import PACKAGE, join_pieces, write_pieces
from bench.gpu.part import Part
from bench.gpu.parts.kernels import DISTINCT, SWEEP, Mix
from bench.gpu.parts.triton_tests import caught, outcomes
from bench.gpu.predict import predictions
from bench.gpu.table import page, section
from bench.gpu.timing import COLD_BYTES, MOST_COPIES, copies_of
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
    (case,) = (figures for key, figures in found["figures"].items() if "T=" in key)
    assert case.keys() >= METHODS | {"frozen_us", "lora_gathered_us", "lora_one_for_all_us"}
    assert ("lora_vllm_us" in case) == (find_spec("vllm") is not None)


def test_engine_part_measures_every_method_with_and_without_graphs(tmp_path: Path) -> None:
    found = dry_run("engine", tmp_path)
    assert found["left_out"] == {}
    for method in METHODS:
        for graphs in ("on", "off"):
            assert f"{method}, graphs {graphs}, 4 requests" in found["figures"]
            assert f"{method}, graphs {graphs}, a step of 4 tasks" in found["figures"]
    assert "lora in PyTorch, 4 requests" in found["figures"]
    assert "tensorpoly-2, of lora in PyTorch, 4 requests" in section(found)


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
        raise RuntimeError("out of memory")

    part.add("first", {"kernels": 1, "launches": 2, "device_ms": 3.0})
    part.try_to("second", fail, least=0)
    part.try_to("third", lambda: {"never": 0}, least=61)
    found = json.loads((tmp_path / "engine.json").read_text())
    assert list(found["figures"]) == ["first"]
    assert found["left_out"] == {"second": "RuntimeError: out of memory", "third": "no time left"}
    assert not found["finished"]
    assert "cut short" in page(tmp_path)


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


def test_every_part_has_a_module() -> None:
    assert {path.stem for path in (TESTS / "bench" / "gpu" / "parts").glob("*.py")} == {
        module for module, _ in PARTS.values()
    }
