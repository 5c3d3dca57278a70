"""What a GPU needs of the plug-in, without one: padded steps, and routing at fixed addresses.

vLLM's own layers stand in a model without its engine, and vLLM's own code calls the manager before
a step and before a capture, as its two model runners do. The table is read by slot, as on a GPU,
and PyTorch's operators run the adapters. A captured graph launches what its capture launched, on
the same tensors; `Captured` does that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig
from vllm.config import CUDAGraphMode
from vllm.model_executor.layers.linear import LinearBase
from vllm.v1.worker.gpu.lora_utils import create_lora_capture_hook
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.serving import backends, builder
from polyrex.adapters.spec import AdapterSpec
from polyrex.kernels import routing
from polyrex.kernels.routing import StepRouting
from polyrex.server.engines.vllm.plugin import CONFIG_KEY, RouterManager, WorkerExtension
from support.random_inventory import make_inventory, make_task
from support.small_model import SPECS, spec_id

SLOTS, BATCH, CAPTURED = 6, 24, 16
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
BASE = (0, 0, 0, 0, 0)


class Packed(LinearBase):  # type: ignore[misc]
    """One layer for several projections, as in vLLM's Llama."""

    def __init__(self, d_in: int, outputs: list[int], name: str) -> None:
        super().__init__(d_in, sum(outputs), prefix=name, disable_tp=True)
        self.output_partition_sizes = outputs
        self.weight = nn.Parameter(0.05 * torch.randn(sum(outputs), d_in), requires_grad=False)
        self.quant_method = SimpleNamespace(apply=lambda layer, x, _bias: F.linear(x, layer.weight))


class LlamaForCausalLM(nn.Module):
    """The linear layers of the small model, packed as vLLM packs them."""

    packed_modules_mapping = PACKED

    def __init__(self, base: str) -> None:
        super().__init__()
        config: Any = AutoConfig.from_pretrained(base)
        self.config = config
        hidden, inner = config.hidden_size, config.intermediate_size
        keys = config.num_key_value_heads * hidden // config.num_attention_heads
        shapes = {
            "self_attn.qkv_proj": (hidden, [hidden, keys, keys]),
            "self_attn.o_proj": (hidden, [hidden]),
            "mlp.gate_up_proj": (hidden, [inner, inner]),
            "mlp.down_proj": (inner, [hidden]),
        }
        for number in range(config.num_hidden_layers):
            for last, (d_in, outputs) in shapes.items():
                self._put(f"model.layers.{number}.{last}", d_in, outputs)

    def _put(self, name: str, d_in: int, outputs: list[int]) -> None:
        *parents, last = name.split(".")
        place: nn.Module = self
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = getattr(place, parent)
        place.add_module(last, Packed(d_in, outputs, name))


class Worker(LoRAModelRunnerMixin):  # type: ignore[misc]
    """A model with our manager, as vLLM's model runners drive it; `run` calls all of its layers."""

    def __init__(
        self, base: str, inventory: Inventory, mode: CUDAGraphMode = CUDAGraphMode.PIECEWISE
    ) -> None:
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(base)
        config = SimpleNamespace(
            model_config=SimpleNamespace(dtype=torch.float32),
            compilation_config=SimpleNamespace(
                static_forward_context={},
                cudagraph_mode=mode,
                max_cudagraph_capture_size=CAPTURED,
            ),
            lora_config=SimpleNamespace(max_loras=SLOTS - 1, max_lora_rank=1),
            scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=BATCH),
            additional_config={CONFIG_KEY: {"state_bytes": 1 << 20}},
        )
        self.lora_config = config.lora_config
        self.lora_manager = RouterManager(inventory, config, torch.device("cpu"))
        self.lora_manager.create_lora_manager(self.model, config)
        self.model_runner = self  # where WorkerExtension looks
        self.layers = [each for each in self.model.modules() if isinstance(each, LinearBase)]
        for slot in range(1, SLOTS):
            weights = make_task(inventory, slot).router.weights
            WorkerExtension.polyrex_write(self, slot, weights.numpy().tobytes())

    def begin(self, *slots: int) -> None:
        """What vLLM calls before a step, with the adapter of each token."""
        self._set_active_loras((), tuple(np.array(slots, dtype=np.int32)), set())

    @contextmanager
    def capturing(self, tokens: int, adapters: int, runner: str = "V1") -> Iterator[None]:
        """What vLLM calls before it captures a decode step, with `adapters` of them at once."""
        if runner == "V2":
            with self.maybe_setup_dummy_loras(self.lora_config):
                create_lora_capture_hook(self.lora_config, self)(adapters, tokens, tokens)
                yield
            return
        ones = np.ones(tokens, dtype=np.int32)
        with self.maybe_dummy_run_with_lora(self.lora_config, ones, ones, False, adapters):
            yield
        self.maybe_remove_all_loras(self.lora_config)

    def run(self, tokens: int) -> list[Tensor]:
        """Every layer's output for its own inputs, the same for each token in every call."""
        return [layer.quant_method.apply(layer, x(layer, tokens)) for layer in self.layers]


class Captured:
    """A graph of a step of `tokens` tokens, with adapters unless `adapters` is 0."""

    def __init__(
        self, worker: Worker, tokens: int, adapters: int = SLOTS, runner: str = "V1"
    ) -> None:
        self._worker, self._tokens = worker, tokens
        with worker.capturing(tokens, adapters, runner):
            self._step = worker.lora_manager._context.first(tokens)

    def replay(self) -> list[Tensor]:
        """Launch the same on the same tensors, whatever the step is now."""
        context = self._worker.lora_manager._context
        now, context.step = context.step, again(self._step)
        try:
            return self._worker.run(self._tokens)
        finally:
            context.step = now


def again(step: StepRouting | None) -> StepRouting | None:
    """The tensors of a step, without what was computed from them."""
    if step is None:
        return None
    return StepRouting(step.weights, step.rows, step.dtype, step.plan, True, step.slot_places)


def x(layer: LinearBase, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(layer.input_size)
    return torch.randn(BATCH, layer.input_size, generator=generator)[:tokens]


@pytest.fixture(params=SPECS, ids=spec_id)
def spec(request: pytest.FixtureRequest) -> AdapterSpec:
    found: AdapterSpec = request.param
    return found


@pytest.fixture
def inventory(small_base: str, tmp_path: Path, spec: AdapterSpec) -> Inventory:
    return make_inventory(tmp_path / "inventory.safetensors", small_base, spec)


@pytest.fixture
def worker(small_base: str, inventory: Inventory, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """A worker that reads its table by slot, as on a GPU."""
    monkeypatch.setattr(backends, "BACKENDS", ())
    with monkeypatch.context() as gpu:
        gpu.setattr(routing, "reads_by_slot", lambda _device: True)
        gpu.setattr(builder, "reads_by_slot", lambda _device: True)
        return Worker(small_base, inventory)


@pytest.fixture
def right(small_base: str, inventory: Inventory) -> Worker:
    """The slow twin: gathers each step's rows, and is never padded, as on the CPU."""
    return Worker(small_base, inventory, CUDAGraphMode.NONE)


def assert_close(found: list[Tensor], expected: list[Tensor], tokens: int) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[:tokens], other[:tokens], rtol=1e-4, atol=1e-4)


def test_padding_gets_the_base_model(worker: Worker, right: Worker) -> None:
    batch = (1, 0, 2, 2, 5)
    worker.begin(*batch)
    right.begin(*batch, *BASE)
    expected = right.run(10)
    for size in (5, 8, CAPTURED):  # layers of one step may see more or less of its padding
        assert_close(worker.run(size), expected, min(size, 10))


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_a_graph_adds_what_the_last_step_says(worker: Worker, right: Worker, runner: str) -> None:
    graph = Captured(worker, 8, runner=runner)
    for batch in ((3, 3, 0, 1, 4, 5, 2, 1), (2, 4), (5,), (0, 1, 2, 3, 4, 5)):
        worker.begin(*batch)
        right.begin(*batch, *[0] * (8 - len(batch)))
        assert_close(graph.replay(), right.run(8), 8)


def test_a_graph_with_adapters_adds_nothing_for_the_base_model(
    worker: Worker, right: Worker
) -> None:
    graph = Captured(worker, 8)
    worker.begin(*range(1, 6))
    worker.begin(*BASE)
    right.begin(*BASE)
    expected = right.run(8)
    for found in (graph.replay(), worker.run(8)):
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_a_graph_captured_without_adapters_has_none(
    worker: Worker, right: Worker, runner: str
) -> None:
    graph = Captured(worker, 8, adapters=0, runner=runner)
    worker.begin(1, 2, 3)
    right.begin(*BASE)
    assert all(map(torch.equal, graph.replay(), right.run(8)))


def test_a_slot_that_changes_hands_changes_in_the_graph(
    worker: Worker, right: Worker, inventory: Inventory
) -> None:
    graph = Captured(worker, 3)
    worker.begin(2, 1, 2)
    before = [each.clone() for each in graph.replay()]
    row = make_task(inventory, 77).router.weights
    worker.lora_manager.write(2, row)
    right.lora_manager.write(2, row)
    worker.begin(2, 1, 2)
    right.begin(2, 1, 2)
    after = graph.replay()
    assert_close(after, right.run(3), 3)
    if inventory.routing_shape[1]:  # or all tasks have the one adapter
        for old, new in zip(before, after, strict=True):
            assert (old != new).any(1).tolist() == [True, False, True]


@pytest.mark.parametrize("spec", [AdapterSpec("tensorpoly-1", rank=3, experts=3)], ids=spec_id)
def test_rows_that_moved_would_be_noticed(worker: Worker, right: Worker) -> None:
    graph = Captured(worker, 3)
    tokens = worker.lora_manager._table._tokens
    assert tokens is not None
    tokens._rows = tokens._rows.clone()  # planted: the buffer is made anew
    worker.begin(5, 4, 5)
    right.begin(5, 4, 5)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(graph.replay(), right.run(3), 3)


@pytest.mark.parametrize("spec", [AdapterSpec("tensorpoly-1", rank=3, experts=3)], ids=spec_id)
def test_a_step_fits_the_largest_batch_and_the_largest_graph(worker: Worker) -> None:
    worker.begin(*[1] * BATCH)
    worker.run(BATCH)
    addresses = []
    for tokens in (BATCH, 3, CAPTURED):
        worker.begin(*[2] * tokens)
        step = worker.lora_manager._context.step
        assert step is not None
        addresses.append((step.rows.data_ptr(), step.weights.data_ptr()))
    assert len(set(addresses)) == 1
    with pytest.raises(AssertionError, match="the table is for"):
        worker.begin(*[1] * (BATCH + 1))


@pytest.mark.parametrize("spec", [AdapterSpec("tensorpoly-1", rank=3, experts=3)], ids=spec_id)
def test_states_that_move_under_graphs_are_no_silent_answer(worker: Worker) -> None:
    states = worker.lora_manager._context.states
    assert states is not None
    states.generation = 2
    with pytest.raises(AssertionError, match="states that have moved"):
        worker.begin(1)
