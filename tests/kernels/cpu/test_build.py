"""The compiled operators are built once; without a compiler, PyTorch stands in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from polyrex.kernels.cpu.build import why_not_compiled

PROGRAM = """
import torch
from polyrex.adapters.methods.registry import make_experts
from polyrex.adapters.serving.builder import LayerBuilder
from polyrex.adapters.serving.layers import Slice
from polyrex.adapters.spec import AdapterSpec, TargetModule
from polyrex.kernels.cpu.build import why_not_compiled

experts = make_experts(AdapterSpec("lora"), TargetModule("m", 8, 8))
experts.reset(torch.Generator())
layer = LayerBuilder(torch.float32, torch.device("cpu"), 0).build([Slice.whole(0, experts)])
print(type(layer).__name__, "|", why_not_compiled())
"""


def test_they_are_built_where_the_tests_run() -> None:
    assert why_not_compiled() is None


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_pytorch_stands_in(compiler: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"CXX": compiler, "POLYREX_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    layer, _, reason = done.stdout.strip().partition(" | ")
    assert layer == "DeltaLayer"
    assert reason.startswith("the CPU operators were not built")
    assert "stand in" in done.stderr
    assert list((tmp_path / "kernels").iterdir()) == []
