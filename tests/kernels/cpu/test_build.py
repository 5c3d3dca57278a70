"""The compiled operators are built once; without a compiler, PyTorch stands in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from polyrex.kernels.cpu import build
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


PLANTED = """
#include <cstdio>
__attribute__((constructor)) static void run() { std::fclose(std::fopen(MARKER, "w")); }
"""


def plant(cache: Path, marker: Path) -> Path:
    """A library where the operators are looked for; it makes a file when it is loaded."""
    folder = cache / "kernels"
    folder.mkdir(mode=0o700)
    (cache / "planted.cpp").write_text(PLANTED)
    library = folder / f"routed-{build._fingerprint()}.so"
    command = ["c++", "-shared", "-fPIC", f'-DMARKER="{marker}"', str(cache / "planted.cpp")]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library


SOMEBODY, ANOTHER = 4242, 12345


def make_foreign(library: Path) -> str:
    """Let a library be of another user than the one who asks; returns how that one is told who."""
    if os.geteuid() == 0:
        os.chown(library, ANOTHER, ANOTHER)
    return f"import os\nos.geteuid = lambda: {SOMEBODY}\n"


@pytest.mark.parametrize("open_to", ["nobody", "folder", "file", "owner"])
def test_a_library_that_another_user_could_have_written_is_not_loaded(
    tmp_path: Path, open_to: str
) -> None:
    marker = tmp_path / "marker"
    library = plant(tmp_path, marker)
    if open_to in ("folder", "file"):
        (library if open_to == "file" else library.parent).chmod(0o777)
    program = (make_foreign(library) if open_to == "owner" else "") + PROGRAM
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"POLYREX_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert marker.exists() == (open_to == "nobody")
    if open_to != "nobody":
        reason = "belongs to another user" if open_to == "owner" else "every user may write to this"
        assert reason in done.stderr
        assert done.stdout.startswith("DeltaLayer")
