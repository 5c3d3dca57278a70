"""The part of polyrex that runs inside vLLM's workers: `vllm.general_plugins` calls `register`.

vLLM calls its LoRA manager once to prepare the model, and before every step with the adapter of
each token. RouterManager takes that manager's place if polyrex started the engine: it looks up the
tokens' rows of the routing table, where the id of an adapter is its slot.

On a GPU vLLM calls it likewise before it captures a graph, with made-up adapters or with none. What
a graph with adapters reads is at fixed addresses, so that a replay adds what the last call said:
nothing, for tokens of the base model and for padding.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.lora.layers import LoRAMapping
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
from vllm.v1.worker import lora_model_runner_mixin

from polyrex.adapters.errors import BaseModelMismatch
from polyrex.adapters.files.inventory import Inventory, read_experts, read_inventory
from polyrex.adapters.methods.protocol import Experts
from polyrex.adapters.model.base_model import identify
from polyrex.adapters.serving.builder import LayerBuilder
from polyrex.adapters.serving.layers import Slice
from polyrex.kernels.routing import RoutingTable
from polyrex.server.engines.process.environment import ENGINE_HOST
from polyrex.server.engines.process.parent_death import die_with_parent

from .layers import PaddedContext, RoutedLayer, install, register_operator

logger = logging.getLogger(__name__)

CONFIG_KEY = "polyrex"
"""The key of vLLM's `additional_config` that holds inventory (a path), sha256 and state_bytes."""


def register() -> None:
    """Install the operator and RouterManager; vLLM calls this in each process, even repeatedly.

    A process of an engine that polyrex started also ends with the one that started it.
    """
    if ENGINE_HOST in os.environ:
        die_with_parent()
    register_operator()
    theirs = lora_model_runner_mixin.LRUCacheWorkerLoRAManager
    if isinstance(theirs, _ManagerChoice):
        return
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = _ManagerChoice(theirs)


class _ManagerChoice:
    """Takes the place of vLLM's manager class, which other engines in the process still get."""

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs

    def __call__(self, vllm_config: Any, device: torch.device, embedding_modules: Any) -> Any:
        ours = vllm_config.additional_config.get(CONFIG_KEY)
        if ours is None:
            return self._theirs(vllm_config, device, embedding_modules)
        inventory = read_inventory(Path(ours["inventory"]))
        if inventory.sha256 != ours["sha256"]:
            raise BaseModelMismatch(
                f"{inventory.path}: the file has changed since it was first read"
            )
        return RouterManager(inventory, vllm_config, device)


class RouterManager:
    """Implements what vLLM's worker calls about adapters, on a routing table."""

    def __init__(self, inventory: Inventory, vllm_config: Any, device: torch.device) -> None:
        self._inventory = inventory
        self._dtype = vllm_config.model_config.dtype
        self._layers = vllm_config.compilation_config.static_forward_context
        self._context = PaddedContext()
        self._slots = 1 + vllm_config.lora_config.max_loras  # row 0 is the base model
        self._sizes = vllm_config.scheduler_config
        self._padded = _largest_graph(vllm_config.compilation_config)
        self._state_bytes: int = vllm_config.additional_config[CONFIG_KEY]["state_bytes"]
        self._device = device
        self._table: RoutingTable

    def create_lora_manager(self, model: nn.Module, vllm_config: Any) -> nn.Module:
        """Give the inventory's target modules their adapters.

        Raises BaseModelMismatch if the model is not the inventory's, or lacks a target module.
        """
        inventory = self._inventory
        # The engine has checked the weights: once, and not in every worker.
        inventory.base.check_configuration(identify(model), str(inventory.path))
        everyone = read_experts(inventory)
        experts = {each.target.name: (i, each) for i, each in enumerate(everyone)}
        builder = LayerBuilder(self._dtype, self._device, self._state_bytes, self._context)
        packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
        for name, layer in model.named_modules():
            if isinstance(layer, LinearBase):
                found = list(_slices(name, layer, packed, experts, self._device))
                if found:
                    served = builder.build(found)
                    gathered = layer.tp_size if _gathers(layer, found[0].experts) else 1
                    routed = RoutedLayer(served, self._context, gathered)
                    install(layer, routed, self._layers)
        if experts:
            missing = ", ".join(sorted(experts)[:3])
            raise BaseModelMismatch(f"{inventory.path}: vLLM's model has no {missing}")
        self._table = RoutingTable(
            self._slots,
            *inventory.table_shape,
            self._device,
            self._dtype,
            builder.planner(everyone[0], min(self._sizes.max_num_seqs, self._slots - 1)),
            max(self._sizes.max_num_batched_tokens, self._padded),
        )
        return model

    def write(self, slot: int, row: Tensor) -> None:
        """Put a row of routing weights [M, W] in a slot."""
        self._table.write(slot, row)

    def set_active_adapters(self, _requests: object, mapping: LoRAMapping) -> None:
        """Set the routing of the next step from the adapter of each token, and of its padding."""
        slots = mapping.index_mapping
        slots += (0,) * (self._padded - len(slots))
        self._context.set(self._table.step(slots, self._dtype))
        # The first step with adapters, before any capture, makes room for as many as can run.
        assert self._context.generation <= 1, "graphs were captured with states that have moved"

    # A task is in its slot before a request names it: there is nothing to load or to evict.

    def add_adapter(self, _request: object) -> bool:
        return True

    def add_dummy_lora(self, _request: object, rank: int) -> bool:
        return True

    def remove_adapter(self, _adapter: int) -> bool:
        return True

    def pin_adapter(self, _adapter: int) -> bool:
        return True

    def list_adapters(self) -> set[int]:
        return set()

    def remove_all_adapters(self) -> None:
        self._context.set(None)

    def supports_tower_connector_lora(self) -> bool:
        return False

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        yield


def _largest_graph(compilation: Any) -> int:
    """The tokens of the largest step that vLLM pads to the size of a captured graph; 0 for none."""
    if not compilation.cudagraph_mode:
        return 0
    largest: int = compilation.max_cudagraph_capture_size or 0
    return largest


class WorkerExtension:
    """Methods that vLLM adds to its worker class; the engine calls them by `collective_rpc`."""

    model_runner: Any

    def polyrex_write(self, slot: int, row: bytes) -> None:
        """Put a row of routing weights, float32 in row-major order, in a slot."""
        manager: RouterManager = self.model_runner.lora_manager
        manager.write(slot, torch.frombuffer(bytearray(row), dtype=torch.float32))


def _slices(
    name: str,
    layer: LinearBase,
    packed: dict[str, list[str]],
    experts: dict[str, tuple[int, Experts]],
    device: torch.device,
) -> Iterable[Slice]:
    """The target modules in one layer of vLLM's; they are removed from `experts`."""
    parent, _, last = name.rpartition(".")
    rank, ranks = layer.tp_rank, layer.tp_size
    modules = packed.get(last, [last])
    begin = 0
    for module, size in zip(modules, _sizes(layer, modules), strict=True):
        index, found = experts.pop(f"{parent}.{module}", (0, None))
        columns = slice(begin, begin + size)
        begin += size
        if found is None:
            continue
        target = found.target
        inputs, outputs = slice(0, target.d_in), slice(0, target.d_out)
        if isinstance(layer, RowParallelLinear):
            if not _gathers(layer, found):
                inputs = _shard(target.d_in, target.d_in // ranks, rank, ranks)
        else:
            outputs = _shard(target.d_out, size, rank, ranks)
        yield Slice(index, found.to(device), columns, inputs, outputs)


def _gathers(layer: LinearBase, experts: Experts) -> bool:
    """Whether adapters need other ranks' inputs: only linear ones can be summed over ranks."""
    return isinstance(layer, RowParallelLinear) and experts.routes_by_token


def _sizes(layer: LinearBase, modules: Sequence[str]) -> list[int]:
    """The number of a layer's outputs, on this rank, of each module that is packed in it."""
    sizes: list[int] = layer.output_partition_sizes
    if len(modules) > 1 or len(sizes) == 1:
        return sizes
    # The checkpoint has them in one matrix, of which a rank holds several pieces.
    if layer.tp_size > 1:
        raise BaseModelMismatch(
            f"{layer.prefix}: its projections are one in the checkpoint, "
            f"which tensor parallelism cannot serve with adapters"
        )
    return [sum(sizes)]


def _shard(whole: int, size: int, rank: int, ranks: int) -> slice:
    """The slice on one rank of a dimension cut into parts of `size`; ranks may share a part."""
    parts = whole // size
    begin = rank * parts // ranks * size
    return slice(begin, begin + size)
