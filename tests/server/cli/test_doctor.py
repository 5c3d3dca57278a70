"""`polyrex doctor`, on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polyrex.adapters.methods.registry import METHODS
from polyrex.adapters.serving.backends import explain
from polyrex.kernels.roofline.model_shapes import MODELS
from polyrex.server.config import (
    Device,
    Dtype,
    EmbeddedConfig,
    EngineName,
    Launch,
    VllmEngineConfig,
)
from polyrex.server.doctor import installation, machine
from polyrex.server.doctor.finding import Finding, Status
from support.command_line import polyrex

POLYREX = str(Path(sys.executable).with_name("polyrex"))
PARTS = [
    "Packages",
    "C++ compiler",
    "Processor",
    "Cores",
    "GPU",
    "vLLM",
    "Base model",
    "Inventory",
    "Cache folder",
    "Tasks folder",
    "Memory",
]


def doctor(*arguments: object, status: int = 0) -> dict[str, Any]:
    done = polyrex("doctor", "--json", *arguments)
    assert done.exit_code == status, done.output
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def finding(report: dict[str, Any], part: str) -> dict[str, str]:
    found: dict[str, str]
    (found,) = (each for each in report["findings"] if each["part"] == part)
    return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tasks folder that can be written, set in the environment."""
    monkeypatch.setenv("POLYREX_SERVE_TASKS_DIR", str(tmp_path / "tasks"))
    return tmp_path


def test_a_working_installation_is_said_to_be_one(here: Path) -> None:
    report = doctor("--embedded.kv-cache-tokens", 1024)
    assert report["ready"]
    assert [each["part"] for each in report["findings"]] == PARTS
    assert f"torch {torch.__version__}" in finding(report, "Packages")["found"]
    assert str(here / "tasks") in finding(report, "Tasks folder")["found"]
    printed = polyrex("doctor", "--embedded.kv-cache-tokens", 1024).stdout
    assert all(part in printed for part in (*PARTS, *METHODS))
    assert "polyrex serve can start with these settings." in printed


@pytest.mark.parametrize("dtype", list(Dtype))
def test_backends_are_those_that_serving_chooses(here: Path, dtype: Dtype) -> None:
    report = doctor("--dtype", dtype, "--device", "cpu")
    shown = {(each["method"], each["backend"], each["reason"]) for each in report["backends"]}
    kind, cpu = getattr(torch, dtype), torch.device("cpu")
    assert shown == {
        (name, *explain(spec, kind, cpu)) for name, cls in METHODS.items() for spec in cls.examples
    }


@pytest.mark.parametrize(
    ("option", "value", "part"),
    [
        ("--inventory", "no/such.safetensors", "Inventory"),
        ("--base", "some/other-model", "Inventory"),
        ("--tasks-dir", "/proc/tasks", "Tasks folder"),
        ("--embedded.state-bytes", 1 << 50, "Memory"),
        ("--embedded.kv-cache-tokens", 1 << 40, "Memory"),
        pytest.param(
            "--device",
            "cuda",
            "GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA"),
        ),
    ],
)
def test_whatever_serve_needs_and_lacks_is_named(
    here: Path, option: str, value: object, part: str
) -> None:
    report = doctor(option, value, status=1)
    assert not report["ready"]
    assert finding(report, part)["status"] == "missing"
    assert finding(report, part)["advice"]
    printed = polyrex("doctor", option, value)
    assert printed.exit_code == 1
    assert "polyrex serve cannot start with these settings:" in printed.stdout
    assert part in printed.stdout.rpartition("settings:")[2]


def test_a_missing_compiler_is_named_with_what_runs_instead(tmp_path: Path) -> None:
    environment = os.environ | {
        "CXX": "no-such-compiler",
        "POLYREX_CACHE": str(tmp_path),
        "POLYREX_SERVE_TASKS_DIR": str(tmp_path),
        "POLYREX_SERVE_DEVICE": "cpu",
    }
    done = subprocess.run(
        [POLYREX, "doctor", "--json"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr  # PyTorch's own operators stand in
    report = json.loads(done.stdout)
    compiler = finding(report, "C++ compiler")
    assert compiler["status"] == "note"
    assert compiler["found"] == "no-such-compiler: not found"
    assert "PyTorch's own operators run instead" in compiler["effect"]
    assert "CXX" in compiler["advice"]
    assert any("the CPU operators were not built" in each["reason"] for each in report["backends"])


def test_vllm_is_needed_by_its_engine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyrex.server.engines.vllm.version.SUPPORTED", "==9.9")
    assert installation.vllm(Launch()).status is Status.note
    needed = installation.vllm(Launch(engine=EngineName.vllm))
    assert needed.status is Status.missing
    assert "polyrex works with vLLM ==9.9" in needed.found or "not installed" in needed.found


def test_memory_is_what_the_engine_allocates() -> None:
    shape = MODELS["HuggingFaceTB/SmolLM2-135M"]
    launch = Launch(embedded=EmbeddedConfig(kv_cache_tokens=1000, state_bytes=5))
    assert installation.memory_needs(launch, shape) == {
        "weights": 4 * shape.parameters,
        "KV cache": 1000 * 46080,  # the 46 KB a token of its help text
        "state of tasks": 5,
    }
    launch = Launch(
        dtype=Dtype.bfloat16,
        engine=EngineName.vllm,
        vllm=VllmEngineConfig(kv_cache_bytes=7, state_bytes=3),
    )
    assert installation.memory_needs(launch, shape) == {
        "weights": 2 * shape.parameters,
        "KV cache": 7,
        "state of tasks": 3,
    }


def test_threads_beyond_the_quota_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cgroup_cores", lambda: 1.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    found = machine.cores(Launch())
    assert found.status is Status.note
    assert "1.5 by cgroup quota" in found.found
    assert "OMP_NUM_THREADS=1" in found.advice


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        ("amx_bf16 avx512f avx2", Status.ok, "AMX"),
        ("avx2", Status.ok, "lacks AMX, AVX-512"),
        ("sse2", Status.note, "has none of them"),
    ],
)
def test_the_processor_is_judged_by_its_flags(
    monkeypatch: pytest.MonkeyPatch, flags: str, status: Status, said: str
) -> None:
    monkeypatch.setattr(machine, "_cpu_flags", lambda: frozenset(flags.split()))
    found: Finding = machine.processor(replace(Launch(), device=Device.cpu))
    assert found.status is status
    assert said in found.found + found.effect
