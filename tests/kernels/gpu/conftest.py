"""Triton kernels run on the GPU, or else under Triton's interpreter in a process of its own.

Triton decides at import which of the two runs its functions, so that interpreted kernels cannot
share a process with tests that compile: `test_triton_interpreter.py` starts the other process.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not (INTERPRETED or torch.cuda.is_available()):
    collect_ignore_glob = [
        "test_triton_*_space.py",
        "test_triton_factored.py",
        "test_triton_layers.py",
    ]


@pytest.fixture
def device() -> torch.device:
    """The device of the tensors in a kernel's test."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def scratch_of_nans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new tensors with NaN: what a kernel does not write must not look like a result."""

    new_empty = Tensor.new_empty

    def new_nans(self: Tensor, *size: Any, **options: Any) -> Tensor:
        new = new_empty(self, *size, **options)
        return new.fill_(torch.nan) if new.is_floating_point() else new

    monkeypatch.setattr(Tensor, "new_empty", new_nans)


@pytest.fixture(scope="session", autouse=INTERPRETED)
def bfloat16_products() -> None:
    """Let the interpreter multiply bfloat16, which it keeps as 16-bit integers."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def exact(handle: Any) -> Any:
        if handle.dtype.scalar != interpreter.tl.bfloat16:
            return handle
        bits = handle.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), interpreter.tl.float32)

    def create_dot_of_any(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, exact(a), exact(b), *rest)

    builder.create_dot = create_dot_of_any
