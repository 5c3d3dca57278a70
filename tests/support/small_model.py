"""A small random Llama with an inventory of every method, for the tests of the vLLM engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from polyrex.adapters.files.inventory import Inventory, read_inventory, write_inventory
from polyrex.adapters.files.registry import TaskInfo, TaskVersion
from polyrex.adapters.files.router import RouterMetadata, read_router, router_bytes
from polyrex.adapters.model.attach import AdaptedModel, attach, find_targets
from polyrex.adapters.model.base_model import load_base
from polyrex.adapters.spec import AdapterSpec

VOCABULARY = 500

SPECS = (
    AdapterSpec("lora", rank=3, alpha=2.0),
    AdapterSpec("poly", rank=3, experts=5),
    AdapterSpec("mhr", rank=3, experts=5, splits=2),
    AdapterSpec("tlora", rank=3),
    AdapterSpec("tensorpoly-1", rank=3, experts=5),
    AdapterSpec("tensorpoly-2", rank=3, experts=5),
    AdapterSpec("tensorpoly-x", rank=3, experts=3),
    AdapterSpec("trex", rank=3, rank_out=5, form="static"),
    AdapterSpec("trex", rank=3, rank_out=5, form="mix"),
    AdapterSpec("trex", rank=3, form="diagonal"),
    AdapterSpec("molora", rank=2, experts=5),
    AdapterSpec("sira", rank=2, experts=7),
)


def spec_id(spec: AdapterSpec) -> str:
    return f"trex-{spec.form}" if spec.method == "trex" else spec.method


def write_small_model(folder: Path) -> None:
    """Heads that two ranks can share, and weights so large that no two tokens are a close call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    model: nn.Module = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)  # type: ignore[operator]


def make_inventory(path: Path, base_path: str, spec: AdapterSpec, spread: float = 0.3) -> Inventory:
    """Random experts on every projection; what begins at 0 is drawn with that deviation."""
    model = load_base(base_path, torch.float32)
    adapted = attach(model, spec, find_targets(model))
    open_adapters(adapted, spread)
    write_inventory(path, adapted)
    return read_inventory(path)


def open_adapters(adapted: AdaptedModel, spread: float) -> None:
    """Give what is drawn as 0 a value: fresh experts contribute nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted.layers:
            parameters = dict(layer.experts.named_parameters())
            if "gate" in parameters:
                parameters["gate"].fill_(spread)
            else:
                nn.init.normal_(parameters["lora_b"], std=spread, generator=generator)


def make_task(inventory: Inventory, seed: int, name: str | None = None) -> TaskVersion:
    """A task version with a random router."""
    generator = torch.Generator().manual_seed(seed)
    logits = 6 * torch.randn(inventory.routing_shape, generator=generator)
    if inventory.spec.form == "static":
        logits /= 6  # weights themselves, not logits
    name = name or f"task-{seed}"
    data = router_bytes(logits, inventory.spec, RouterMetadata(inventory.sha256, name))
    router = read_router(data, "test", inventory)
    return TaskVersion(TaskInfo(name, 1, router.sha256, len(data), 0.0, "", {}, {}), router)


def renamed(task: TaskVersion, name: str) -> TaskVersion:
    """The same router under another name."""
    return TaskVersion(replace(task.info, name=name), task.router)
