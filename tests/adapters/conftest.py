"""Small specs of every method, and a small model with an inventory, for the tests of adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from polyrex.adapters.files.inventory import Inventory, read_inventory, write_inventory
from polyrex.adapters.files.router import RouterMetadata, router_bytes
from polyrex.adapters.methods.protocol import Experts
from polyrex.adapters.methods.registry import METHODS, make_experts
from polyrex.adapters.model.attach import attach, find_targets
from polyrex.adapters.spec import AdapterSpec, TargetModule
from support.small_model import random_llama

MakeModel = Callable[..., nn.Module]
MakeRouter = Callable[..., bytes]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are tiny here: a second thread would only be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SMALL_SPECS = tuple(spec for method in METHODS.values() for spec in method.examples)


def spec_id(spec: AdapterSpec) -> str:
    detail = {"trex": f"-{spec.form}"}.get(spec.method, f"-{spec.order}")
    return f"{spec.method}{detail}"


@pytest.fixture
def small_specs() -> tuple[AdapterSpec, ...]:
    """All that `small_spec` takes in turn."""
    return SMALL_SPECS


@pytest.fixture(params=SMALL_SPECS, ids=spec_id)
def small_spec(request: pytest.FixtureRequest) -> AdapterSpec:
    """A spec of every method and form, in turn; sizes are odd."""
    spec: AdapterSpec = request.param
    return spec


@pytest.fixture(
    params=[TargetModule("narrowing", 15, 9), TargetModule("widening", 9, 21)],
    ids=lambda target: str(target.name),
)
def small_target(request: pytest.FixtureRequest) -> TargetModule:
    """A target module, in turn smaller and larger on its output."""
    target: TargetModule = request.param
    return target


@pytest.fixture
def random_experts(small_spec: AdapterSpec, small_target: TargetModule) -> Experts:
    """Experts of the small spec whose delta is not 0: every parameter is drawn."""
    experts = make_experts(small_spec, small_target)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in experts.named_parameters():
        scale = 1e-2 if name.endswith("_raw") else 0.7
        nn.init.normal_(parameter, std=scale, generator=generator)
    return experts


@pytest.fixture
def make_model() -> MakeModel:
    """Makes a small language model, `make_model(hidden_size=...)`; the same every time."""
    return random_llama


@pytest.fixture
def small_inventory(make_model: MakeModel, tmp_path: Path) -> Inventory:
    """A TensorPoly-I inventory of the small model, in float32, its gates open."""
    model = make_model()
    adapted = attach(model, AdapterSpec("tensorpoly-1", rank=3, experts=4), find_targets(model))
    for layer in adapted.layers:
        nn.init.constant_(layer.experts.get_parameter("gate"), 0.01)
    path = tmp_path / "inventory.safetensors"
    write_inventory(path, adapted)
    return read_inventory(path)


@pytest.fixture
def make_small_router(small_inventory: Inventory) -> MakeRouter:
    """Makes the file of a random router for the small inventory: `make_small_router(seed)`."""

    def make(seed: int = 0) -> bytes:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(small_inventory.routing_shape, generator=generator)
        metadata = RouterMetadata(
            small_inventory.sha256, f"task-{seed}", "a task", {"rows": 32}, {"accuracy": 0.5}
        )
        return router_bytes(logits, small_inventory.spec, metadata)

    return make
