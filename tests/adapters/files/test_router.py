"""The router file: what is written is read, and hostile bytes are refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from polyrex.adapters.errors import (
    FileError,
    InventoryMismatch,
    MalformedFile,
    TensorMismatch,
)
from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.router import (
    RouterMetadata,
    read_router,
    router_bytes,
    size_limit,
    write_router,
)
from polyrex.adapters.files.tensor_file import serialise, sha256
from polyrex.adapters.spec import AdapterSpec

MakeRouter = Callable[..., bytes]
Tensors = dict[str, Tensor]


def header(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    parsed: dict[str, Any] = json.loads(data[8 : 8 + length])
    return parsed


def with_metadata(data: bytes, **metadata: str) -> bytes:
    return serialise(load(data), header(data)["__metadata__"] | metadata)


def with_tensors(data: bytes, tensors: Tensors) -> bytes:
    return serialise(tensors, header(data)["__metadata__"])


def test_written_router_is_read(small_inventory: Inventory, tmp_path: Path) -> None:
    logits = torch.randn(small_inventory.routing_shape)
    metadata = RouterMetadata(
        small_inventory.sha256, "boolq", "yes or no?", {"rows": 32}, {"test": {"accuracy": 0.7}}
    )
    path = tmp_path / "boolq.safetensors"
    digest = write_router(path, logits, small_inventory.spec, metadata)
    router = read_router(path.read_bytes(), "boolq", small_inventory)
    assert torch.equal(router.logits, logits)
    assert torch.equal(router.weights, small_inventory.route(logits))
    assert router.metadata == metadata
    assert router.sha256 == digest == sha256(path.read_bytes())


def test_router_is_a_few_kilobytes(
    small_inventory: Inventory, make_small_router: MakeRouter
) -> None:
    assert len(make_small_router()) < 4 * 14 * 4 + 1024


def test_same_router_gives_the_same_bytes(make_small_router: MakeRouter) -> None:
    assert make_small_router(3) == make_small_router(3)


def test_router_of_a_method_without_routing_is_empty(
    small_inventory: Inventory, make_small_router: MakeRouter
) -> None:
    lora = replace(small_inventory, spec=AdapterSpec("lora"))
    data = router_bytes(torch.empty(14, 0), lora.spec, RouterMetadata(lora.sha256, "task"))
    assert read_router(data, "router", lora).logits.shape == (14, 0)
    assert torch.equal(lora.route(torch.empty(14, 0)), torch.ones(14, 1))


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_router_is_refused(
    keep: int, small_inventory: Inventory, make_small_router: MakeRouter
) -> None:
    with pytest.raises(MalformedFile, match="upload: no complete safetensors file"):
        read_router(make_small_router()[:keep], "upload", small_inventory)


def test_oversized_router_is_refused_before_it_is_read(small_inventory: Inventory) -> None:
    limit = size_limit(small_inventory)
    with pytest.raises(MalformedFile, match=f"at most {limit} bytes, got {limit + 1}"):
        read_router(bytes(limit + 1), "upload", small_inventory)


def test_oversized_header_is_refused(
    small_inventory: Inventory, make_small_router: MakeRouter
) -> None:
    # Without its tensor, a file can have too long a header and still be small enough as a whole.
    metadata = header(make_small_router())["__metadata__"]
    room = (32 << 10) + 100 - len(serialise({}, metadata))
    data = serialise({}, metadata | {"description": "x" * room})
    with pytest.raises(MalformedFile, match=r"the header has .* at most 32768 are allowed"):
        read_router(data, "upload", small_inventory)


@pytest.mark.parametrize(
    "data", [b"PK\x03\x04" + bytes(96), b"\x80\x04" * 40, b"{}", bytes(100)], ids=repr
)
def test_bytes_that_are_no_safetensors_file_are_refused(
    data: bytes, small_inventory: Inventory
) -> None:
    with pytest.raises(MalformedFile, match="upload: "):
        read_router(data, "upload", small_inventory)


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({"format": "polyrex.inventory"}, MalformedFile, "expected a polyrex.router file"),
        ({"format_version": "2"}, MalformedFile, "got '2'; a newer polyrex wrote it"),
        ({"inventory_sha256": "0" * 64}, InventoryMismatch, "made for inventory '0000"),
        ({"method": "poly"}, InventoryMismatch, "method must be tensorpoly-1, .* got 'poly'"),
        ({"method": "qlora"}, InventoryMismatch, "method must be tensorpoly-1, .* got 'qlora'"),
        ({"hyperparameters": "{}"}, InventoryMismatch, "hyperparameters must be .* got '{}'"),
        ({"provenance": "[]"}, MalformedFile, "'provenance' must be a JSON object"),
        ({"scores": '{"f1": NaN}'}, MalformedFile, "'scores' is not readable JSON"),
        ({"scores": '{"a": "\\ud800"}'}, MalformedFile, "'scores' is not readable JSON"),
    ],
    ids=str,
)
def test_defective_metadata_is_refused(
    metadata: dict[str, str],
    error: type[FileError],
    message: str,
    small_inventory: Inventory,
    make_small_router: MakeRouter,
) -> None:
    with pytest.raises(error, match=message):
        read_router(with_metadata(make_small_router(), **metadata), "upload", small_inventory)


@pytest.mark.parametrize(
    "key",
    ["format", "method", "hyperparameters", "inventory_sha256", "task", "description", "scores"],
)
def test_missing_metadata_is_named(
    key: str, small_inventory: Inventory, make_small_router: MakeRouter
) -> None:
    data = make_small_router()
    metadata = header(data)["__metadata__"]
    del metadata[key]
    with pytest.raises(MalformedFile, match=key):
        read_router(serialise(load(data), metadata), "upload", small_inventory)


GOOD = torch.zeros(14, 4)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "tensor routing is missing"),
        ({"weights": GOOD}, "tensor routing is missing"),
        ({"routing": GOOD, "more": torch.ones(1)}, "tensor more is not expected"),
        ({"routing": GOOD[:13]}, r"routing must have shape \[14, 4\], got \[13, 4\]"),
        ({"routing": GOOD.flatten()}, r"routing must have shape \[14, 4\], got \[56\]"),
        ({"routing": GOOD.double()}, "routing must be of dtype F32, got F64"),
        ({"routing": GOOD.half()}, "routing must be of dtype F32, got F16"),
        ({"routing": GOOD.int()}, "routing must be of dtype F32, got I32"),
        ({"routing": GOOD + float("nan")}, "routing holds values that are not finite"),
        ({"routing": GOOD - float("inf")}, "routing holds values that are not finite"),
    ],
    ids=["none", "name", "extra", "rows", "flat", "float64", "float16", "int", "NaN", "inf"],
)
def test_tensor_that_is_not_as_it_should_be_is_named(
    tensors: Tensors,
    message: str,
    small_inventory: Inventory,
    make_small_router: MakeRouter,
) -> None:
    with pytest.raises(TensorMismatch, match=f"upload: tensor {message.removeprefix('tensor ')}"):
        read_router(with_tensors(make_small_router(), tensors), "upload", small_inventory)


def test_raw_routing_numbers_that_overflow_in_half_precision_are_refused(
    small_inventory: Inventory,
) -> None:
    static = replace(small_inventory, spec=AdapterSpec("trex", rank=2, form="static"))
    logits = torch.full((14, 4), 1e5)
    data = router_bytes(logits, static.spec, RouterMetadata(static.sha256, "task"))
    with pytest.raises(TensorMismatch, match="routing weights of routing overflows in float16"):
        read_router(data, "upload", static)


def test_router_that_is_not_finite_is_not_written(small_inventory: Inventory) -> None:
    metadata = RouterMetadata(small_inventory.sha256, "boolq")
    with pytest.raises(TensorMismatch, match="router boolq holds values that are not finite"):
        router_bytes(GOOD + float("nan"), small_inventory.spec, metadata)
