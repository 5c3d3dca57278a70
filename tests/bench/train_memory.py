"""The memory of training steps on the CPU, beside what `polyrex plan --train` predicts.

Every allocation of PyTorch is counted, from the loop's start to its end: what Python and libraries
need is not in it. Rows are of equal length and of random tokens, and of many tasks. The last line
is one JSON document.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from polyrex.adapters.methods.registry import method_class
from polyrex.adapters.model.attach import attach, find_targets
from polyrex.adapters.model.base_model import DEFAULT_BASE, load_base, resolve_base
from polyrex.adapters.model.training_cost import adapter_costs
from polyrex.adapters.spec import AdapterSpec
from polyrex.kernels.roofline.model_shapes import MODELS, ModelShape
from polyrex.kernels.roofline.training import TrainMemory, TrainStep, train_memory
from polyrex.server.cli.plan_training import frozen_model
from polyrex.training.data.batches import Example
from polyrex.training.loop.run import LoopConfig, run
from polyrex.training.model.checkpointing import checkpoint_layers
from polyrex.training.model.loading import use_eager_attention
from polyrex.training.model.multi_task import MultiTaskModel

from .cases import MAIN, OTHERS
from .gpu.subjects.random_model import random_llama
from .harness import command_line, machine, report, without

SHAPES = {
    "deep": ModelShape(12, 256, 704, 8, 4, 32, 4096, tied=True),
    "wide": ModelShape(4, 1024, 2816, 16, 8, 64, 32_000, tied=False),
    DEFAULT_BASE: MODELS["HuggingFaceTB/SmolLM2-135M"],
}
"""Two random Llamas, and the real small model."""
METHODS = {name: (MAIN | OTHERS)[name] for name in ("tensorpoly-1", "tensorpoly-2", "trex-mix")}
STEPS = {
    "plain": TrainStep(rows=16, tokens=64, answers=4),
    "checkpointing": TrainStep(rows=16, tokens=64, answers=4, checkpointing=True),
    "accumulate": TrainStep(rows=16, tokens=64, answers=4, accumulate=4),
}
TASKS = 12


@dataclass(frozen=True)
class Case:
    """A training run whose memory is measured."""

    shape: ModelShape
    spec: AdapterSpec
    step: TrainStep
    dtype: torch.dtype
    tasks: int
    fused_attention: bool = False

    def predicted(self) -> TrainMemory:
        """What `polyrex plan --train` says."""
        shape, distinct = self.shape, min(self.tasks, self.step.rows_of_part)
        costs = adapter_costs(
            self.spec, shape, self.step, tasks=self.tasks, distinct=distinct, dtype=self.dtype
        )
        frozen = frozen_model(shape, self.dtype, fused_attention=self.fused_attention)
        return train_memory(frozen, costs.modules, costs.routing, self.step)

    def measured(self, base: nn.Module) -> float:
        """The largest sum of the tensors' bytes in two steps of training."""
        if self.step.checkpointing:
            checkpoint_layers(base)
        model = MultiTaskModel(attach(base, self.spec, find_targets(base)), self.tasks, seed=0)
        loop = LoopConfig(
            steps=2,
            batch_rows=self.step.rows,
            accumulate=self.step.accumulate,
            rates=method_class(self.spec.method).rates,
        )
        groups, rows = model.parameter_groups(), self.rows()

        def train() -> None:
            run(model, groups, rows, loop, pad=0, progress=lambda _: None)

        return held(*base.parameters(), *model.parameters()) + peak_of(train)

    def rows(self) -> list[Example]:
        """Rows of random tokens, whose tasks take turns."""
        tokens = torch.randint(
            self.shape.vocabulary,
            (self.step.rows, self.step.tokens),
            generator=torch.Generator().manual_seed(0),
        )
        prompt = self.step.tokens - self.step.answers
        return [
            Example(number % self.tasks, tuple(row[:prompt]), tuple(row[prompt:]))
            for number, row in enumerate(tokens.tolist())
        ]


def held(*tensors: Tensor) -> int:
    """The bytes of tensors, of those that share a storage once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def peak_of(call: Callable[[], None]) -> int:
    """The largest sum of what PyTorch allocates on the CPU during a call, beyond what is there."""
    gc.collect()  # or what an earlier call has left may be freed meanwhile, and is subtracted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    results: Any = profiled.profiler
    events = [
        (event.start_ns(), event.nbytes())
        for event in results.kineto_results.events()
        if event.name() == "[memory]"
    ]
    events.sort(key=lambda event: event[0])
    sizes: list[int] = [size for _, size in events]
    return max(accumulate(sizes))


def cases() -> Iterator[tuple[dict[str, str], Case]]:
    """Every case, and what distinguishes it."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    for shape, method, dtype, step in product(SHAPES, METHODS, dtypes, STEPS):
        names = {"model": shape, "method": method, "dtype": dtype, "step": step}
        yield names, Case(SHAPES[shape], METHODS[method], STEPS[step], dtypes[dtype], TASKS)


def measure(names: dict[str, str], case: Case) -> dict[str, Any]:
    """A line of the result."""
    if names["model"] == DEFAULT_BASE:
        base = load_base(resolve_base(DEFAULT_BASE), case.dtype)
    else:
        base = random_llama(case.shape, torch.device("cpu"), case.dtype)
    use_eager_attention(base)
    predicted, measured = case.predicted(), case.measured(base)
    return {
        **names,
        "predicted_mb": round(predicted.peak / 1e6, 1),
        "measured_mb": round(measured / 1e6, 1),
        "predicted_over_measured": round(predicted.peak / measured, 3),
        "peak_at": predicted.peak_at,
    }


def main() -> None:
    arguments = command_line(__doc__).parse_args()
    rows = []
    for names, case in cases():
        rows.append(measure(names, case))
        print(*rows[-1].values(), flush=True)
    ratios = [float(row["predicted_over_measured"]) for row in rows]
    document = {
        "machine": machine(),
        "steps": {name: asdict(step) for name, step in STEPS.items()},
        "lowest": min(ratios),
        "highest": max(ratios),
        "cases": rows,
    }
    report(document, arguments.out, without(document, "cases"))


if __name__ == "__main__":
    main()
