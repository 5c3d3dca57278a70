"""The fingerprint of weights: the same for copies of a model, another for every other model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor

from polyrex.adapters.errors import MalformedFile
from polyrex.adapters.model.fingerprint import FINGERPRINT, comparable, fingerprint
from support.small_model import random_llama

Tensors = dict[str, Tensor]
OLD_BASE = Path(__file__).parents[2] / "fixtures" / "old_files" / "base"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY = "model.layers.{}.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in bfloat16 whose output layer is its embeddings; matrices are sampled."""
    path: Path = tmp_path_factory.mktemp("base")
    model: Any = random_llama(64, 96, tie_word_embeddings=True, initializer_range=0.2)
    model.bfloat16().save_pretrained(path)
    return path


def copy(folder: Path, to: Path, change: Callable[[Tensors], Tensors | None]) -> str:
    """A copy of a model's folder after `change` was at its tensors."""
    to.mkdir()
    tensors = load_file(folder / WEIGHTS)
    tensors = change(tensors) or tensors
    save_file({name: each.contiguous() for name, each in tensors.items()}, to / WEIGHTS)
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    return str(to)


def in_dtype(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: each.to(dtype) for name, each in tensors.items()}


def without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): each for name, each in tensors.items()}


def with_another_prefix(tensors: Tensors) -> Tensors:
    return {f"language_model.{name}": each for name, each in tensors.items()}


def with_output_layer(tensors: Tensors) -> Tensors:
    return tensors | {HEAD: tensors[EMBEDDINGS].clone()}


def with_output_layer_alone(tensors: Tensors) -> Tensors:
    return {HEAD if name == EMBEDDINGS else name: each for name, each in tensors.items()}


def with_an_old_buffer(tensors: Tensors) -> Tensors:
    return tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8)}


COPIES: dict[str, Callable[[Tensors], Tensors]] = {
    "float32": in_dtype(torch.float32),
    "float16": in_dtype(torch.float16),
    "without a prefix": without_prefix,
    "another prefix": with_another_prefix,
    "output layer stored": with_output_layer,
    "output layer stored alone": with_output_layer_alone,
    "an old buffer": with_an_old_buffer,
}


@pytest.mark.parametrize("change", COPIES.values(), ids=COPIES)
def test_a_copy_of_the_model_has_its_fingerprint(
    change: Callable[[Tensors], Tensors], folder: Path, tmp_path: Path
) -> None:
    found = fingerprint(str(folder))
    assert found is not None
    assert FINGERPRINT.fullmatch(found)
    assert fingerprint(copy(folder, tmp_path / "copy", change)) == found


@pytest.mark.parametrize("reverse", [False, True])
def test_shards_have_the_fingerprint_of_the_whole(
    reverse: bool, folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors, reverse=reverse)
    shards = {f"{n}.safetensors": names[n::3] for n in range(3)}
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, tmp_path / file)
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert fingerprint(str(tmp_path)) == fingerprint(str(folder))
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(MalformedFile, match=r"index\.json: it names 1\.safetensors"):
        fingerprint(str(tmp_path))


def one_tensor(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] += 0.05 * torch.randn(tensors[name].shape).bfloat16()

    return change


def one_bit_in_a_hundred(tensors: Tensors) -> None:
    """As after a short fine-tune in bfloat16, in which most values stay."""
    for each in tensors.values():
        each.view(torch.int16).view(-1)[::100] ^= 1


def two_layers_swapped(tensors: Tensors) -> None:
    one, other = QUERY.format(0), QUERY.format(1)
    tensors[one], tensors[other] = tensors[other], tensors[one]


def another_shape(tensors: Tensors) -> None:
    tensors[QUERY.format(0)] = tensors[QUERY.format(0)].reshape(32, 128)


def an_output_layer_of_its_own(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDINGS].flip(0)


def a_tensor_less(tensors: Tensors) -> None:
    del tensors[QUERY.format(1)]


OTHERS: dict[str, Callable[[Tensors], None]] = {
    "first layer": one_tensor(QUERY.format(0)),
    "last layer": one_tensor("model.layers.1.mlp.down_proj.weight"),
    "a norm": one_tensor("model.norm.weight"),
    "embeddings": one_tensor(EMBEDDINGS),
    "a hundredth of all values": one_bit_in_a_hundred,
    "layers swapped": two_layers_swapped,
    "shape": another_shape,
    "output layer": an_output_layer_of_its_own,
    "a tensor less": a_tensor_less,
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_another_model_of_the_same_shape_has_another(
    change: Callable[[Tensors], None], folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    assert fingerprint(copy(folder, tmp_path / "other", change)) != fingerprint(str(folder))


def test_small_tensors_of_two_layers_are_not_interchangeable(folder: Path, tmp_path: Path) -> None:
    def scale_norms(one: float, other: float) -> Callable[[Tensors], None]:
        def change(tensors: Tensors) -> None:
            tensors["model.layers.0.input_layernorm.weight"] *= one
            tensors["model.layers.1.input_layernorm.weight"] *= other

        return change

    found = fingerprint(copy(folder, tmp_path / "one", scale_norms(2, 3)))
    assert found != fingerprint(copy(folder, tmp_path / "other", scale_norms(3, 2)))


def test_the_fingerprint_of_a_model_stays_what_it_is() -> None:
    """Inventories hold it: another way to make it needs another version."""
    assert fingerprint(str(OLD_BASE)) == "float-1:048ea3e477cfc9d6da7a0f87169471b6"


def test_float32_weights_have_the_fingerprint_of_what_they_are_rounded_to(tmp_path: Path) -> None:
    model: Any = random_llama(64, 96)
    model.save_pretrained(tmp_path / "float32")
    model.bfloat16().save_pretrained(tmp_path / "bfloat16")
    assert fingerprint(str(tmp_path / "float32")) == fingerprint(str(tmp_path / "bfloat16"))


def test_quantised_files_compare_only_with_those_of_the_same_library(
    folder: Path, tmp_path: Path
) -> None:
    found = {}
    for library in ("awq", "gptq", "awq again"):
        path = copy(folder, tmp_path / library, lambda _: {"0.qweight": torch.arange(9)})
        config = {"quantization_config": {"quant_method": library.split()[0]}}
        (tmp_path / library / "config.json").write_text(json.dumps(config))
        found[library] = fingerprint(path) or ""
    own = fingerprint(str(folder)) or ""
    assert found["awq"] == found["awq again"]
    assert comparable(found["awq"], found["awq again"])
    assert not comparable(found["awq"], found["gptq"])
    assert not comparable(found["awq"], own)


def test_a_model_without_safetensors_files_has_none(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert fingerprint(str(tmp_path)) is None
    assert fingerprint("nobody/has-downloaded-it") is None


def test_a_hub_id_is_looked_up_among_the_downloads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloaded = tmp_path / "models--some--model"
    (downloaded / "refs").mkdir(parents=True)
    (downloaded / "refs" / "main").write_text("abc")
    shutil.copytree(folder, downloaded / "snapshots" / "abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert fingerprint("some/model") == fingerprint(str(folder))


@pytest.mark.parametrize("keep", [3, 100, 0.5, 0.999])
def test_damaged_files_are_named(keep: float, folder: Path, tmp_path: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[: int(keep if keep > 1 else len(data) * keep)])
    with pytest.raises(MalformedFile, match=r"model\.safetensors: no complete safetensors file"):
        fingerprint(str(tmp_path))


def test_an_8b_model_takes_few_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most four blocks of a kilobyte a tensor, however large it is: the files are 16 GB."""
    shapes = {EMBEDDINGS: [128256, 4096], HEAD: [128256, 4096], "model.norm.weight": [4096]}
    for layer in range(32):
        for module, shape in {
            "self_attn.q_proj": [4096, 4096],
            "self_attn.k_proj": [1024, 4096],
            "self_attn.v_proj": [1024, 4096],
            "self_attn.o_proj": [4096, 4096],
            "mlp.gate_proj": [14336, 4096],
            "mlp.up_proj": [14336, 4096],
            "mlp.down_proj": [4096, 14336],
        }.items():
            shapes[f"model.layers.{layer}.{module}.weight"] = shape
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # a hole, which takes no room
    sizes = []
    read = os.pread

    def count(file: int, size: int, offset: int) -> bytes:
        sizes.append(size)
        return read(file, size, offset)

    monkeypatch.setattr(os, "pread", count)
    assert fingerprint(str(tmp_path)) is not None
    assert len(sizes) <= 4 * len(shapes)
    assert max(sizes) <= 8192
