"""Fixtures of all tests: the real base model, a random inventory for it, random routers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.files.inventory import Inventory, read_inventory, write_inventory
from polyrex.adapters.files.router import RouterMetadata, router_bytes
from polyrex.adapters.model.attach import attach, find_targets
from polyrex.adapters.model.base_model import DEFAULT_BASE, load_base, load_tokenizer, resolve_base
from polyrex.adapters.spec import AdapterSpec

MakeRouter = Callable[..., bytes]

os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="the folder of golden vectors that the adapters are checked against",
    )


@pytest.fixture(scope="session")
def base_path() -> str:
    """The folder of SmolLM2-135M-Instruct, converted on first use."""
    return resolve_base(DEFAULT_BASE)


@pytest.fixture(scope="session")
def tokenizer(base_path: str) -> PreTrainedTokenizerBase:
    """The base model's tokenizer."""
    return load_tokenizer(base_path)


@pytest.fixture(scope="session")
def random_inventory(base_path: str, tmp_path_factory: pytest.TempPathFactory) -> Inventory:
    """A TensorPoly-I inventory on every projection of the base model, as it is drawn, with its
    gates open so far that the tasks say different things."""
    path: Path = tmp_path_factory.mktemp("inventory") / "inventory.safetensors"
    model = load_base(base_path, torch.float32)
    adapted = attach(model, AdapterSpec("tensorpoly-1", rank=16, experts=8), find_targets(model))
    with torch.no_grad():
        for layer in adapted.layers:
            gate = layer.experts.gate
            assert isinstance(gate, torch.nn.Parameter)
            gate.fill_(0.2)
    write_inventory(path, adapted)
    return read_inventory(path)


@pytest.fixture(scope="session")
def make_router(random_inventory: Inventory) -> MakeRouter:
    """Makes the file of a random router for the random inventory: `make_router(seed)`."""

    def make(seed: int, **metadata: object) -> bytes:
        logits = torch.randn(
            random_inventory.routing_shape, generator=torch.Generator().manual_seed(seed)
        )
        about = RouterMetadata(random_inventory.sha256, f"random-{seed}", **metadata)  # type: ignore[arg-type]  # passed on
        return router_bytes(6 * logits, random_inventory.spec, about)

    return make
