"""Runs the tests of the Triton kernels on machines without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.interpreter import assert_pass_interpreted

HERE = Path(__file__).parent
FILES = (
    "test_triton_rank_space.py",
    "test_triton_pair_space.py",
    "test_triton_factored.py",
    "test_triton_layers.py",
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU, in this process")
def test_kernels_agree_with_their_twins_under_the_interpreter() -> None:
    assert_pass_interpreted(HERE, FILES)
