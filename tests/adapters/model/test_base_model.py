"""The base model on its way from the file to a device, as it is or quantised."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from polyrex.adapters.errors import DeviceError
from polyrex.adapters.model.attach import attach, find_targets
from polyrex.adapters.model.base_model import Quantisation, load_base, move
from polyrex.adapters.spec import AdapterSpec
from support.card_operators import CUDA, CardTensor
from support.placement import Card
from support.small_model import random_llama

SPEC = AdapterSpec("poly", rank=2, experts=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in bfloat16."""
    path: Path = tmp_path_factory.mktemp("base")
    model: Any = random_llama(64, 96, tie_word_embeddings=True, initializer_range=0.2)
    model.bfloat16().save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_weights_on_a_card_are_those_of_the_file(folder: Path, dtype: torch.dtype) -> None:
    """Tables of positions stay in float32, as on the CPU; the output layer stays the input's."""
    expected: Any = load_base(str(folder), dtype)
    found: Any = load_base(str(folder), torch.bfloat16)
    with Card():
        move(found, dtype, CUDA)
        tensors = found.state_dict() | dict(found.named_buffers())
        assert all(isinstance(tensor, CardTensor) for tensor in tensors.values())
        assert found.lm_head.weight is found.model.embed_tokens.weight
        for name, tensor in (expected.state_dict() | dict(expected.named_buffers())).items():
            assert tensors[name].dtype == tensor.dtype
            assert torch.equal(tensors[name].cpu(), tensor)
        assert (found.dtype, found.config.dtype) == (dtype, dtype)


@pytest.mark.parametrize(("bits", "package"), [("4bit", "bitsandbytes"), ("8bit", "torchao")])
def test_missing_library_is_told_in_one_line(
    folder: Path, bits: Quantisation, package: str
) -> None:
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(DeviceError, match=f"quantised base model on cpu: .*{package}") as caught:
        load_base(str(folder), torch.bfloat16, "cpu", bits)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize(
    ("bits", "package", "near"), [("4bit", "bitsandbytes", 0.6), ("8bit", "torchao", 0.99)]
)
def test_adapters_train_on_a_quantised_model(
    folder: Path, bits: Quantisation, package: str, near: float
) -> None:
    """Their gradients are near those on the model as it is; the wrong case is another model."""
    pytest.importorskip(package)

    def gradient(model: Any) -> torch.Tensor:
        adapted = attach(model, SPEC, find_targets(model))
        adapted.add_composed(torch.ones(1, len(adapted.layers), 3))
        model(input_ids=torch.arange(12).view(2, 6)).logits.square().mean().backward()
        found = [layer.experts.get_parameter("lora_b").grad for layer in adapted.layers]
        return torch.cat([each.flatten() for each in found if each is not None])

    expected = gradient(load_base(str(folder), torch.float32))
    another = load_base(str(folder), torch.float32)
    for parameter in another.parameters():
        parameter.data = parameter.data.flip(0)
    other = gradient(another)
    found = gradient(load_base(str(folder), torch.float32, "cpu", bits))
    assert torch.cosine_similarity(found, expected, 0) > near
    assert torch.cosine_similarity(other, expected, 0) < 0.4
