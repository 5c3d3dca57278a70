"""A random model with adapters of one method, its tasks, and what an engine needs of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.cases import PROMPT_TOKENS
from bench.gpu.subjects.random_model import attach_random, random_llama
from polyrex.adapters.files.inventory import Inventory, read_inventory, write_inventory
from polyrex.adapters.files.task import TaskVersion
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.spec import AdapterSpec
from polyrex.kernels.roofline.model_shapes import ModelShape
from polyrex.server.config import EmbeddedConfig
from polyrex.server.engines.base import GenerationRequest, SamplingParams
from polyrex.server.engines.embedded.cuda_graphs import CudaGraphs
from polyrex.server.engines.embedded.generation import Generation
from polyrex.server.engines.embedded.runner import ModelRunner

PROMPT = tuple(range(PROMPT_TOKENS))
MOST_TOKENS = 64
"""Of a request, with its prompt: four whole blocks of the cache."""
GREEDY = SamplingParams(MOST_TOKENS - PROMPT_TOKENS, temperature=0.0, ignore_eos=True)

Step = Callable[[], None]


@dataclass(frozen=True)
class ServedModel:
    """An adapted model with its inventory and tasks, to make engines of."""

    adapted: AdaptedModel
    inventory: Inventory
    tasks: Sequence[TaskVersion]

    @classmethod
    @contextmanager
    def build(
        cls,
        shape: ModelShape,
        spec: AdapterSpec,
        tasks: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Iterator[ServedModel]:
        """A model on its device; its inventory is a file within this context."""
        adapted = attach_random(random_llama(shape, device, dtype), spec)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "inventory.safetensors"
            write_inventory(path, adapted)
            inventory = read_inventory(path)
            yield cls(adapted, inventory, [_task(inventory, number) for number in range(tasks)])

    def mix(self, requests: int, distinct: int) -> list[TaskVersion | None]:
        """The tasks of some requests: so many distinct ones, or none."""
        return [self.tasks[n % distinct] if distinct else None for n in range(requests)]


def config_for(requests: int, *, graphs: bool) -> EmbeddedConfig:
    """An engine for so many requests at once, whose prompts fit into one step."""
    return EmbeddedConfig(
        max_batch_tokens=requests * PROMPT_TOKENS,
        max_running=requests,
        slots=requests + 2,
        kv_cache_tokens=requests * MOST_TOKENS,
        prefix_cache=False,  # every prompt is measured
        cuda_graphs=graphs,
    )


class Decoder:
    """Decode steps as the engine's thread runs them, without the thread and its callers."""

    def __init__(self, served: ServedModel, requests: int, *, graphs: bool) -> None:
        """For up to so many requests at once; where there is no CUDA, there are no graphs."""
        device = next(served.adapted.model.parameters()).device
        record = CudaGraphs() if graphs and device.type == "cuda" else None
        config = config_for(requests, graphs=graphs)
        with torch.inference_mode():
            self._runner = ModelRunner(served.adapted, served.inventory, config, record)

    @contextmanager
    def decoding(self, tasks: Sequence[TaskVersion | None]) -> Iterator[Step]:
        """Within it, a request of each of the tasks has its prompt computed.

        Each call computes, draws and reads the next token of all of them. It raises EngineError
        where the engine would answer with an error.
        """
        nobody: Any = None  # waits for the answers
        requests = [GenerationRequest("bench", PROMPT, GREEDY, task) for task in tasks]
        generations = [Generation(request, nobody) for request in requests]
        with torch.inference_mode():
            for generation in generations:
                self._runner.add(generation)
            while not all(generation.generated for generation in generations):
                self._step()
            try:
                yield self._step
            finally:
                for generation in generations:
                    self._runner.abort(generation)

    def _step(self) -> None:
        self._runner.step()
        for _, outcome in self._runner.take_deliveries():
            if isinstance(outcome, Exception):
                raise outcome


def _task(inventory: Inventory, number: int) -> TaskVersion:
    logits = torch.randn(inventory.routing_shape, generator=torch.Generator().manual_seed(number))
    return TaskVersion.unregistered(inventory, f"task-{number}", logits)
