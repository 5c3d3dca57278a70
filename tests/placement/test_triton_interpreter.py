"""Runs tests of this folder once more, with layers on the Triton kernels."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.interpreter import assert_pass_interpreted

HERE = Path(__file__).parent
STEPS = "test_engine.py::test_equal_decode_steps_launch_the_same_and_wait_for_tokens_alone"
TESTS = (
    "test_vllm_layers.py",
    # one method for each kind of layer
    *(f"{STEPS}[{method}]" for method in ("poly", "trex-static", "tensorpoly-2")),
)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process")
def test_layers_on_the_triton_kernels_pass_too() -> None:
    pytest.importorskip("triton")
    assert_pass_interpreted(HERE, TESTS)
