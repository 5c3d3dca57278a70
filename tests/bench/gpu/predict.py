"""What the roofline expects of every figure that goals are set for, before it can be measured.

    python -m bench.gpu.predict

The device is the data sheet's H100, of which good kernels reach three quarters, with the time of a
launch in a CUDA graph (kernels/roofline/roofline.py). Norms, sampling and the host cost nothing
there, and no product finds in a cache what the one before has written: a goal beyond its prediction
can be met by that alone. What a run has measured of these figures stands beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from bench.cases import EXPERTS, NEW_TOKENS, PROMPT_TOKENS, RANK
from bench.gpu import measured
from bench.gpu.measured import Results
from polyrex.kernels.roofline.model_shapes import MODELS, Projection
from polyrex.kernels.roofline.roofline import (
    BYTES,
    FLOAT32_BYTES,
    GPUS,
    AdapterSize,
    Product,
    ServingPath,
    Step,
    StepCost,
    attention,
    base_products,
    base_projection,
    compose,
    low_rank,
    separate,
    shared,
    tensorpoly_2,
    trex_static,
)

DEVICE = GPUS["h100"]
MODEL = MODELS["meta-llama/Llama-3.1-8B"]
SIZE = AdapterSize(EXPERTS, RANK)
PATHS: dict[str, ServingPath] = {
    "trex-static": trex_static,
    "tensorpoly-2": tensorpoly_2,
    "tensorpoly-1": shared,
}
ENGINE_GOALS = {"trex-static": 0.9, "tensorpoly-2": 0.9, "tensorpoly-1": 0.85}
KERNEL_GOALS = {32: 0.7, 2048: 0.6}
LORA_TASKS, LORA_GOAL = 256, 3.0
TRAIN_ROWS, TRAIN_TOKENS, TRAIN_GOAL = 16, 128, 1.5


class Prediction(NamedTuple):
    """One figure: what is predicted, in its unit, the goal, and what finds what was measured."""

    figure: str
    predicted: str
    goal: str
    measured: Callable[[Results], str]


def adapters_of(method: str, projection: Projection, step: Step) -> list[Product]:
    """A method's products in one layer of a decode step on a GPU.

    A GPU keeps the states of tensorpoly-2's tasks in the dtype of the products, where the roofline
    has float32: half of what they add to the bytes; and derives them once, not in every step.
    """
    found = PATHS[method](projection, step, SIZE)
    if method == "tensorpoly-2":
        stateless = tensorpoly_2(projection, replace(step, distinct=0), SIZE)
        pairs = zip(found, stateless, strict=True)
        found = [replace(own, bytes=(own.bytes + less.bytes) / 2) for own, less in pairs]
    return [product for product in found if product.part != "mix"]


def adapters_of_model(method: str, step: Step) -> list[Product]:
    """The same in all layers."""
    layer = [product for p in MODEL.projections for product in adapters_of(method, p, step)]
    return layer * MODEL.layers


def seconds(products: list[Product]) -> float:
    """The time of products on the device."""
    return StepCost.of(products, DEVICE).seconds


def kernel_predictions() -> Iterator[Prediction]:
    """The time of a packed layer with its adapters, and the time that still meets the goal."""
    for tokens, goal in KERNEL_GOALS.items():
        for projection in MODEL.projections:
            frozen = seconds([base_projection(projection, tokens)])
            step = Step(tokens, min(tokens, 1024))
            for method in PATHS:
                added = seconds(adapters_of(method, projection, step))
                whole = 1e6 * (frozen + added)
                yield Prediction(
                    f"8B {projection.name}, T={tokens}, {method}: layer of the roofline",
                    f"{whole:.1f} µs ({1e6 * added:.1f} for the adapters)",
                    f"{goal}: {whole / goal:.1f} µs",
                    partial(measured.layer, name=projection.name, tokens=tokens, method=method),
                )


def decode_step(requests: int) -> Step:
    """A decode step in the middle of the benchmark's completions, each of its own task."""
    return Step(requests, requests, requests, PROMPT_TOKENS + NEW_TOKENS // 2)


def engine_predictions() -> Iterator[Prediction]:
    """Decode steps with adapters, over steps without."""
    for requests in (32, 1024):
        step = decode_step(requests)
        base = seconds(base_products(MODEL, step))
        for method in PATHS:
            added = seconds(adapters_of_model(method, step))
            yield Prediction(
                f"engine, {requests} distinct tasks, {method}: of no adapters",
                f"{base / (base + added):.2f}",
                f"{ENGINE_GOALS[method]}",
                partial(measured.engine, method=method, tasks=requests),
            )


def gathered(projection: Projection, step: Step) -> list[Product]:
    """Batched LoRA in plain PyTorch: the weights of every token are copied, and then read."""
    numbers = 2 * step.tokens * RANK * projection.sides
    copies = Product("gather", 0, BYTES * numbers)
    return [copies, *separate(projection, Step(step.tokens, step.tokens), SIZE)]


def lora_predictions() -> Iterator[Prediction]:
    """Tokens a second over those of batched LoRA in plain PyTorch."""
    step = decode_step(LORA_TASKS)
    base = seconds(base_products(MODEL, step))
    layer = [product for p in MODEL.projections for product in gathered(p, step)]
    loras = base + seconds(layer * MODEL.layers)
    for method in PATHS:
        added = seconds(adapters_of_model(method, step))
        yield Prediction(
            f"engine, {LORA_TASKS} distinct tasks, {method}: of batched LoRA in PyTorch",
            f"{loras / (base + added):.2f}",
            f"{LORA_GOAL}",
            partial(measured.over_lora, method=method, tasks=LORA_TASKS),
        )


def training_step(composed: int, answers: int, adapter_bytes: int) -> float:
    """Seconds of a step that composes so many adapters, and computes so many tokens' logits.

    The frozen products run forward, and once more for the gradients of their inputs; adapters run
    three times; the loss of a token passes over its logits in float32 six times.
    """
    tokens = TRAIN_ROWS * TRAIN_TOKENS
    step = Step(tokens, composed, TRAIN_ROWS)
    frozen = [base_projection(p, tokens) for p in MODEL.projections] + [attention(MODEL, step)]
    adapters = [compose(p, step, SIZE) for p in MODEL.projections]
    for projection in MODEL.projections:
        adapters += low_rank(projection, tokens, RANK, composed)
    scale = adapter_bytes / BYTES
    adapters = [replace(product, bytes=scale * product.bytes) for product in adapters]
    head = base_projection(Projection("lm_head", MODEL.hidden, (MODEL.vocabulary,)), answers)
    loss = Product("loss", 0, 6 * FLOAT32_BYTES * answers * MODEL.vocabulary)
    return seconds([*(frozen * 2 + adapters * 3) * MODEL.layers, head, head, loss])


def training_predictions() -> Iterator[Prediction]:
    """PEFT's poly composes an adapter a row, in float32, and computes the logits of every token."""
    answers = TRAIN_ROWS * TRAIN_TOKENS // 8
    own = training_step(8, answers, BYTES)
    peft = training_step(TRAIN_ROWS, TRAIN_ROWS * TRAIN_TOKENS, FLOAT32_BYTES)
    yield Prediction(
        "training, poly: rows/s of PEFT's poly",
        f"{peft / own:.2f}",
        f"{TRAIN_GOAL}",
        measured.over_peft_poly,
    )


def predictions() -> list[Prediction]:
    """All of them, in the order of the goals."""
    return [
        *kernel_predictions(),
        *engine_predictions(),
        *lora_predictions(),
        *training_predictions(),
    ]


def table(results: Results) -> str:
    """The Markdown table, with what was measured."""
    lines = ["| figure | predicted | measured | goal |", "|---|---:|---:|---:|"]
    for row in predictions():
        found = row.measured(results) or "-"
        lines.append(f"| {row.figure} | {row.predicted} | {found} | {row.goal} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table({}))
