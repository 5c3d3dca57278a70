"""The inventory file: what is written is loaded, and every defect is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from polyrex.adapters.errors import BaseModelMismatch, FileError, MalformedFile, TensorMismatch
from polyrex.adapters.files.inventory import (
    Inventory,
    load_experts,
    read_inventory,
    write_inventory,
)
from polyrex.adapters.files.tensor_file import serialise, write_atomic
from polyrex.adapters.model.attach import AdaptedModel, attach, find_targets
from polyrex.adapters.spec import AdapterSpec

MakeModel = Callable[..., nn.Module]
Tensors = dict[str, Tensor]
Metadata = dict[str, str]
TENSOR = "model.layers.1.mlp.up_proj.weight_leafs_b"


def rewrite(inventory: Inventory, change: Callable[[Tensors, Metadata], Any]) -> Inventory:
    """The inventory's file written anew after `change` was at its tensors and metadata."""
    with safe_open(inventory.path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(inventory.path)
    change(tensors, metadata)
    write_atomic(inventory.path, serialise(tensors, metadata))
    return read_inventory(inventory.path)


def parameters(adapted: AdaptedModel) -> list[Tensor]:
    return [p for layer in adapted.layers for p in layer.experts.parameters()]


def test_every_method_survives_writing_and_loading(
    small_spec: AdapterSpec, make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model()
    adapted = attach(model, small_spec, find_targets(model))
    for parameter in parameters(adapted):
        nn.init.normal_(parameter)
    path = tmp_path / "inventory.safetensors"
    sha256 = write_inventory(path, adapted)
    inventory = read_inventory(path)
    assert inventory.sha256 == sha256
    assert inventory.spec == small_spec
    loaded = load_experts(inventory, make_model())
    assert loaded.targets == adapted.targets == inventory.targets
    for written, read in zip(parameters(adapted), parameters(loaded), strict=True):
        assert torch.equal(written, read)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_inventory_loads_as_float32(
    dtype: torch.dtype, make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model()
    adapted = attach(model, AdapterSpec("lora", rank=2), find_targets(model))
    write_inventory(tmp_path / "inventory", adapted, dtype=dtype)
    loaded = load_experts(read_inventory(tmp_path / "inventory"), make_model())
    for written, read in zip(parameters(adapted), parameters(loaded), strict=True):
        assert read.dtype == torch.float32
        assert torch.equal(written.to(dtype).float(), read)


def test_shapes_of_router_and_table(small_inventory: Inventory) -> None:
    assert small_inventory.routing_shape == (14, 4)
    assert small_inventory.table_shape == (14, 4)
    weights = small_inventory.route(torch.randn(14, 4))
    torch.testing.assert_close(weights.sum(-1), torch.ones(14))


def test_modules_of_a_block_share_routing(small_inventory: Inventory) -> None:
    by_block = replace(small_inventory, spec=replace(small_inventory.spec, granularity="block"))
    assert by_block.routing_shape == (2, 4)
    weights = by_block.route(torch.randn(2, 4))
    assert torch.equal(weights[0], weights[6])
    assert not torch.equal(weights[6], weights[7])


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"hidden_size": 32}, "hidden_size 24, but the loaded model has 32"),
        ({"vocab_size": 60}, "vocabulary_size 50, but the loaded model has 60"),
    ],
    ids=["hidden size", "vocabulary"],
)
def test_wrong_base_model_is_refused_untouched(
    size: dict[str, int], message: str, small_inventory: Inventory, make_model: MakeModel
) -> None:
    model = make_model(**size)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(BaseModelMismatch, match=message):
        load_experts(small_inventory, model)
    assert [name for name, _ in model.named_modules()] == before


def missing(tensors: Tensors, _: Metadata) -> None:
    del tensors[TENSOR]


def unexpected(tensors: Tensors, _: Metadata) -> None:
    tensors["lm_head.gate"] = torch.ones(())


def wrong_shape(tensors: Tensors, _: Metadata) -> None:
    tensors[TENSOR] = tensors[TENSOR][..., 1:].contiguous()


def wrong_dtype(tensors: Tensors, _: Metadata) -> None:
    tensors[TENSOR] = tensors[TENSOR].double()


def not_finite(tensors: Tensors, _: Metadata) -> None:
    tensors[TENSOR][0, 1, 2, 3] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, f"tensor {TENSOR} is missing"),
        (unexpected, r"tensor lm_head\.gate is not expected"),
        (wrong_shape, rf"{TENSOR} must have shape \[2, 4, 3, 6\], got \[2, 4, 3, 5\]"),
        (wrong_dtype, f"{TENSOR} must be of dtype F32 or F16 or BF16, got F64"),
        (not_finite, f"{TENSOR} holds values that are not finite"),
    ],
    ids=["missing", "unexpected", "shape", "dtype", "NaN"],
)
def test_tensor_that_is_not_as_it_should_be_is_named(
    change: Callable[[Tensors, Metadata], None],
    message: str,
    small_inventory: Inventory,
    make_model: MakeModel,
) -> None:
    changed = rewrite(small_inventory, change)
    with pytest.raises(TensorMismatch, match=rf"inventory\.safetensors: tensor .*{message[7:]}"):
        load_experts(changed, make_model())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "polyrex.router", "expected a polyrex.inventory file, .* 'polyrex.router'"),
        ("format_version", "2", "expected format_version 1, got '2'; a newer polyrex wrote it"),
        ("format_version", "one", "expected format_version 1, got 'one'$"),
        ("method", "lora", "method and hyperparameters contradict each other"),
        ("hyperparameters", '{"method": "qlora"}', "no adapter method 'qlora'"),
        ("hyperparameters", '{"method": "lora", "depth": 3}', "unknown hyperparameters depth"),
        ("hyperparameters", '{"method": "lora", "rank": -1}', "rank must be at least 1, got -1"),
        ("hyperparameters", "{", "hyperparameters are not readable"),
        ("targets", "[]", "it names no target modules"),
        ("targets", '[["a", 1]]', "d_out"),
        ("base", "[]", "'base' must be a JSON object"),
        ("base", '{"hidden_size": 3}', "architecture"),
    ],
)
def test_defective_metadata_is_refused(
    key: str, value: str, message: str, small_inventory: Inventory
) -> None:
    with pytest.raises(MalformedFile, match=message):
        rewrite(small_inventory, lambda _, metadata: metadata.update({key: value}))


@pytest.mark.parametrize(
    "key", ["format", "format_version", "method", "hyperparameters", "base", "targets"]
)
def test_missing_metadata_is_named(key: str, small_inventory: Inventory) -> None:
    with pytest.raises(MalformedFile, match=key):
        rewrite(small_inventory, lambda _, metadata: metadata.pop(key))


def test_target_module_that_the_model_lacks_is_named(
    small_inventory: Inventory, make_model: MakeModel
) -> None:
    def rename(tensors: Tensors, metadata: Metadata) -> None:
        metadata["targets"] = json.dumps(
            [["model.layers.0.ghost", *rest] for _, *rest in json.loads(metadata["targets"])[:1]]
        )
        for name in list(tensors):
            if not name.startswith("model.layers.0.self_attn.q_proj."):
                del tensors[name]
            else:
                leaf = name.rpartition(".")[2]
                tensors[f"model.layers.0.ghost.{leaf}"] = tensors.pop(name)

    with pytest.raises(BaseModelMismatch, match=r"model\.layers\.0\.ghost: the model has no such"):
        load_experts(rewrite(small_inventory, rename), make_model())


@pytest.mark.parametrize("keep", [0.01, 0.5, 0.999])
def test_truncated_inventory_is_refused(keep: float, small_inventory: Inventory) -> None:
    data = small_inventory.path.read_bytes()
    small_inventory.path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(MalformedFile, match="no complete safetensors file"):
        read_inventory(small_inventory.path)


def test_missing_inventory_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"nowhere: cannot be read: No such file"):
        read_inventory(tmp_path / "nowhere")


def test_inventory_that_changed_after_it_was_read_is_not_loaded(
    small_inventory: Inventory, make_model: MakeModel
) -> None:
    rewrite(small_inventory, lambda tensors, _: tensors[TENSOR].zero_())
    with pytest.raises(MalformedFile, match="has changed since it was first read"):
        load_experts(small_inventory, make_model())


def test_values_that_overflow_are_not_written(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    adapted = attach(model, AdapterSpec("lora", rank=2), find_targets(model))
    nn.init.constant_(adapted.layers[3].experts.get_parameter("lora_a"), 1e6)
    message = r"layers\.0\.self_attn\.o_proj\.lora_a overflows in float16"
    with pytest.raises(TensorMismatch, match=message):
        write_inventory(tmp_path / "inventory", adapted, dtype=torch.float16)
    assert not (tmp_path / "inventory").exists()


def test_values_that_overflow_where_the_model_computes_are_refused(
    small_inventory: Inventory, make_model: MakeModel
) -> None:
    def enlarge(tensors: Tensors, _: Metadata) -> None:
        tensors["model.layers.1.mlp.up_proj.gate"].fill_(1e6)

    adapted = load_experts(rewrite(small_inventory, enlarge), make_model())
    adapted.prepare(torch.float32)
    with pytest.raises(
        TensorMismatch, match=r"layers\.1\.mlp\.up_proj: the experts are not finite"
    ):
        adapted.prepare(torch.float16)
