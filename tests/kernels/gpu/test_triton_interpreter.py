"""Runs the tests of the Triton kernels on machines without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
FILES = (
    "test_triton_rank_space.py",
    "test_triton_pair_space.py",
    "test_triton_factored.py",
    "test_triton_layers.py",
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU, in this process")
def test_kernels_agree_with_their_twins_under_the_interpreter() -> None:
    files = [str(HERE / name) for name in FILES]
    options = ["--quiet", "--no-header", "-p", "no:cacheprovider", f"--confcutdir={HERE}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
