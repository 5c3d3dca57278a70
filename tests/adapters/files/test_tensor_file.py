"""The parts that all files share: strict JSON, reproducible bytes, atomic writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polyrex.adapters.errors import MalformedFile, TensorMismatch
from polyrex.adapters.files.tensor_file import (
    cast_finite,
    parse,
    serialise,
    strict_json,
    write_atomic,
)

TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.zeros(0, 4)}
METADATA = {"format": "test", "format_version": "1", **{key: key for key in "qwertyuiop"}}


def test_same_content_gives_the_same_bytes() -> None:
    backwards = dict(reversed(METADATA.items()))
    assert serialise(TENSORS, METADATA) == serialise(TENSORS, backwards)


def test_what_was_written_is_read() -> None:
    file = parse(serialise(TENSORS, METADATA), "file", "test", 4096)
    assert dict(file.metadata) == METADATA
    tensors = file.checked({"a": (0, 4), "b": (2, 3)}, ("F32",))
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize(
    "text",
    [
        "[NaN]",
        "[1e999]",
        "[Infinity]",
        '{"a": 1, "a": 2}',
        '["\\ud800"]',
        "[" * 100_000 + "]" * 100_000,
        "1" * 5000,
        "{",
        "",
    ],
    ids=lambda text: text[:10],
)
def test_json_that_could_not_be_sent_on_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # the message is Python's own
        strict_json(text)


def test_cast_names_the_tensor_that_overflows() -> None:
    with pytest.raises(TensorMismatch, match="the gate overflows in float16"):
        cast_finite(torch.tensor([1e6]), torch.float16, "the gate")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_cast_refuses_what_is_not_finite(value: float) -> None:
    with pytest.raises(TensorMismatch, match="the gate holds values that are not finite"):
        cast_finite(torch.tensor([0.0, value]), torch.float32, "the gate")


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_truncated_bytes_are_refused(keep: int) -> None:
    with pytest.raises(MalformedFile, match="no complete safetensors file"):
        parse(serialise(TENSORS, METADATA)[:keep], "file", "test", 4096)


def test_bytes_behind_the_tensors_are_refused() -> None:
    with pytest.raises(MalformedFile, match="no complete safetensors file"):
        parse(serialise(TENSORS, METADATA) + b"more", "file", "test", 4096)


def test_header_over_the_limit_is_refused_before_it_is_read() -> None:
    data = serialise(TENSORS, METADATA)
    with pytest.raises(MalformedFile, match="at most 100 are allowed"):
        parse(data[:8] + b"x" * (len(data) - 8), "file", "test", 100)


def test_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_bytes_are_on_disk_before_the_rename_and_the_rename_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def recorded(*args: Any, real: Callable[..., None] = real, name: str = name) -> None:
            calls.append(name)
            real(*args)

        monkeypatch.setattr(os, name, recorded)
    write_atomic(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace", "fsync"]


def test_crash_before_the_rename_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
