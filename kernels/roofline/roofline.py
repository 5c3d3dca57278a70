"""A lower bound of a step's cost, from shapes alone: a roofline.

A product takes `max(bytes / bandwidth, flops / throughput)`, and on a GPU the launches of its
kernels; a step takes the sum over its products. Each product reads its weights and inputs once and
writes its outputs once, in bfloat16. Left out are norms, softmax, sampling, and the contraction
with the routing weights, which are few. A base model's step has small kernels of these, so that on
a GPU its time is underestimated, and the adapters' share overestimated. Ratios are predicted better
than times.

A step has T tokens of D distinct tasks; there are E experts of rank r; N is the tensor order. For
static T-REX, r is both I and J.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from polyrex.kernels.leaf_size import leaf_size

from .model_shapes import ModelShape, Projection

BYTES = 2
"""The size of a bfloat16 number: weights, activations, keys and values, the routing table."""
FLOAT32_BYTES = 4
"""The size of a number in a router's file, and in tensorpoly-2's leaves, mixed in float32."""
EFFICIENCY = 0.75
"""The share of a data sheet's bandwidth and dense bfloat16 throughput that good kernels reach."""
LAUNCH_SECONDS = 1.5e-6
"""What a GPU's kernel costs beside its work, in a CUDA graph."""


@dataclass(frozen=True)
class DeviceLimits:
    """The bandwidth and throughput that a device reaches, and its memory."""

    bandwidth: float  # bytes a second
    flops: float  # floating-point operations a second
    memory: float | None = None  # bytes
    launch_seconds: float = 0.0  # of a kernel; nothing on a CPU, which calls functions


def _gpu(terabytes: float, teraflops: float, gigabytes: float) -> DeviceLimits:
    """The limits of a GPU from its data sheet: TB/s, dense bfloat16 TFLOP/s, GB."""
    return DeviceLimits(
        EFFICIENCY * terabytes * 1e12,
        EFFICIENCY * teraflops * 1e12,
        gigabytes * 1e9,
        LAUNCH_SECONDS,
    )


MEASURED = {
    # An H100 of 80 GB, torch 2.11 for CUDA 13.0: copying in memory, and a large bfloat16 product
    "h100-measured": DeviceLimits(2.98e12, 775e12, 80e9, LAUNCH_SECONDS),
}
"""Limits that a card has reached, of which no share needs to be taken."""
GPUS = {
    "h200": _gpu(4.8, 989, 141),
    "h100": _gpu(3.35, 989, 80),
    "a100-80g": _gpu(2.039, 312, 80),
    "l40s": _gpu(0.864, 362, 48),
    "a10g": _gpu(0.6, 70, 24),
    **MEASURED,
}


@dataclass(frozen=True)
class AdapterSize:
    """The hyperparameters that decide sizes: E, r and N."""

    experts: int
    rank: int
    order: int = 2


@dataclass(frozen=True)
class Step:
    """One forward pass: T new tokens, in equal parts of `sequences`, of D distinct tasks."""

    tokens: int
    distinct: int
    sequences: int = 1
    context: int = 0
    """Tokens of each sequence that are in the KV cache already."""
    reuse: int = 1
    """Steps like this one that composed weights serve, if they are not kept."""


@dataclass(frozen=True)
class Product:
    """One product: its flops, twice the number of its multiplications, and the bytes it moves."""

    part: str
    flops: float
    bytes: float
    launches: int = 1
    """Kernels that a GPU launches for it; 0 where it is done in the kernel of another product."""

    def seconds(self, device: DeviceLimits) -> float:
        """`max(bytes / bandwidth, flops / throughput)`, and the launches."""
        work = max(self.bytes / device.bandwidth, self.flops / device.flops)
        return work + self.launches * device.launch_seconds


@dataclass(frozen=True)
class StepCost:
    """The sum over the products of a step."""

    seconds: float
    flops: float
    bytes: float
    products: int
    launches: int
    parts: dict[str, float]  # seconds of each part

    @classmethod
    def of(cls, products: Iterable[Product], device: DeviceLimits) -> StepCost:
        """The cost of products that run one after another."""
        done = tuple(products)
        parts: dict[str, float] = defaultdict(float)
        for product in done:
            parts[product.part] += product.seconds(device)
        return cls(
            seconds=sum(parts.values()),
            flops=sum(product.flops for product in done),
            bytes=sum(product.bytes for product in done),
            products=len(done),
            launches=sum(product.launches for product in done),
            parts=dict(parts),
        )


def base_projection(projection: Projection, tokens: int) -> Product:
    """`y = W x`: flops `2 T d_in d_out`; numbers `d_in d_out + T (d_in + d_out)`."""
    d_in, d_out = projection.d_in, sum(projection.outputs)
    numbers = d_in * d_out + tokens * (d_in + d_out)
    return Product(projection.name, 2 * tokens * d_in * d_out, BYTES * numbers)


def attention(model: ModelShape, step: Step) -> Product:
    """One layer's attention.

    For each sequence of n new tokens with c in the cache: flops
    `4 heads head_dim (n c + n (n + 1) / 2)`; numbers `2 kv_heads head_dim (c + n)`, and
    `2 n heads head_dim` of queries and outputs.
    """
    new = step.tokens / step.sequences
    pairs = step.sequences * (new * step.context + new * (new + 1) / 2)
    width, kv_width = model.heads * model.head_dim, model.kv_heads * model.head_dim
    cached = 2 * kv_width * step.sequences * (step.context + new)
    return Product("attention", 4 * width * pairs, BYTES * (cached + 2 * step.tokens * width))


def base_products(model: ModelShape, step: Step) -> list[Product]:
    """The base model's step: all layers, and the LM head for the last token of each sequence."""
    layer = [base_projection(projection, step.tokens) for projection in model.projections]
    layer.append(attention(model, step))
    head = Projection("lm_head", model.hidden, (model.vocabulary,))
    return [*layer * model.layers, base_projection(head, step.sequences)]


def in_one_kernel(products: list[Product]) -> list[Product]:
    """The same products, of which a GPU does all in the kernel of the first."""
    return [products[0], *(replace(product, launches=0) for product in products[1:])]


def low_rank(projection: Projection, tokens: int, width: int, copies: int) -> list[Product]:
    """`y += B (A x)` at rank `width`, with `copies` sets of weights to read.

    The A sides of the n layers that read x are one product: flops `2 T n width d_in`, numbers
    `copies n width d_in + T (d_in + n width)`. Each B side is a product that reads and writes y:
    flops `2 T width d_out`, numbers `copies width d_out + T (width + 2 d_out)`. On a GPU, the B
    sides are one kernel.
    """
    d_in, all_widths = projection.d_in, len(projection.outputs) * width
    numbers = copies * all_widths * d_in + tokens * (d_in + all_widths)
    side_a = Product("A side", 2 * tokens * all_widths * d_in, BYTES * numbers)
    sides_b = [
        Product(
            "B side",
            2 * tokens * width * d_out,
            BYTES * (copies * width * d_out + tokens * (width + 2 * d_out)),
        )
        for d_out in projection.outputs
    ]
    return [side_a, *in_one_kernel(sides_b)]


def shared(projection: Projection, step: Step, size: AdapterSize) -> list[Product]:
    """Every token with the whole inventory: `low_rank` of width `E r`, whatever D is."""
    return low_rank(projection, step.tokens, size.experts * size.rank, 1)


def separate(projection: Projection, step: Step, size: AdapterSize) -> list[Product]:
    """Each task with its own weights, multi-LoRA or composed and kept: `low_rank` of width r."""
    return low_rank(projection, step.tokens, size.rank, step.distinct)


def compose(projection: Projection, step: Step, size: AdapterSize) -> Product:
    """Building A_t and B_t of D tasks: one step's share of it.

    Flops `2 D E r (d_in + d_out)`, numbers `(E + D) r (d_in + d_out)`, summed over the layers of
    the projection.
    """
    numbers = size.rank * projection.sides / step.reuse
    return Product(
        "compose",
        2 * step.distinct * size.experts * numbers,
        BYTES * (size.experts + step.distinct) * numbers,
    )


def composed_anew(projection: Projection, step: Step, size: AdapterSize) -> list[Product]:
    """Each task with its own weights, composed for this step and not kept."""
    return [compose(projection, step, size), *separate(projection, step, size)]


def trex_static(projection: Projection, step: Step, size: AdapterSize) -> list[Product]:
    """`low_rank` of width r, one set for all tasks, with each task's core between the two sides.

    The core of a layer: flops `2 T r^2`, numbers `D r^2 + 2 T r`. A GPU's kernel of the A sides
    does it on the way.
    """
    layers, rank = len(projection.outputs), size.rank
    numbers = layers * (step.distinct * rank**2 + 2 * step.tokens * rank)
    core = Product("core", 2 * step.tokens * layers * rank**2, BYTES * numbers, launches=0)
    return [*low_rank(projection, step.tokens, rank, 1), core]


def tensorpoly_2(projection: Projection, step: Step, size: AdapterSize) -> list[Product]:
    """Leaves mixed for each task, and applied without building the factors.

    A side of dimension d is two halves of `p = q^ceil(N/2)` and `p' = q^floor(N/2)` numbers a row.
    Mixing takes flops `2 D E N r q`, reads `E N r q` numbers and writes `D r (p + p')` in float32.
    Applying a side takes flops `2 T r p (p' + 1)` and reads its halves, and x and y as `low_rank`.
    Mixing is no launch of a step: a GPU's layers do it when the tasks change.
    """
    tokens, rank, layers = step.tokens, size.rank, len(projection.outputs)

    def leaves(dimension: int) -> int:
        return size.order * rank * leaf_size(dimension, size.order)

    def halves(dimension: int) -> tuple[int, int]:
        q = leaf_size(dimension, size.order)
        return q ** ((size.order + 1) // 2), q ** (size.order // 2)

    def state(dimension: int) -> int:
        return FLOAT32_BYTES * step.distinct * rank * sum(halves(dimension))

    def apply(dimension: int) -> int:
        first, second = halves(dimension)
        return 2 * tokens * rank * first * (second + 1)

    d_in = projection.d_in
    sides = [d_in] * layers + list(projection.outputs)
    mixed = size.experts * sum(leaves(side) for side in sides)
    states = sum(state(side) for side in sides)
    activations = tokens * (d_in + layers * rank)
    sides_b = [
        Product("B side", apply(d_out), state(d_out) + BYTES * tokens * (rank + 2 * d_out))
        for d_out in projection.outputs
    ]
    return [
        Product("mix", 2 * step.distinct * mixed, FLOAT32_BYTES * mixed + states, launches=0),
        Product("A side", layers * apply(d_in), layers * state(d_in) + BYTES * activations),
        *in_one_kernel(sides_b),
    ]


ServingPath = Callable[[Projection, Step, AdapterSize], list[Product]]
"""A way to run adapters: the products that it adds to the projections of one input."""
PATHS: dict[str, ServingPath] = {
    "shared": shared,
    "composed": separate,
    "composed, not kept": composed_anew,
    "multi-LoRA": separate,
    "trex static": trex_static,
    "tensorpoly-2": tensorpoly_2,
}


def adapter_products(
    path: ServingPath, model: ModelShape, step: Step, size: AdapterSize
) -> list[Product]:
    """The products of a path in all target modules of the model."""
    layer = [product for p in model.projections for product in path(p, step, size)]
    return layer * model.layers


def break_even(
    path: ServingPath, model: ModelShape, step: Step, size: AdapterSize, device: DeviceLimits
) -> int | None:
    """The least number of distinct tasks, up to T, from which `path` costs more than `shared`.

    None if it never does. The cost of `path` must not fall as D grows.
    """

    def seconds(path: ServingPath, distinct: int) -> float:
        mixed = replace(step, distinct=distinct)
        return StepCost.of(adapter_products(path, model, mixed, size), device).seconds

    cheaper = bisect_right(
        range(1, step.tokens + 1), seconds(shared, 1), key=lambda distinct: seconds(path, distinct)
    )
    return cheaper + 1 if cheaper < step.tokens else None


@dataclass(frozen=True)
class StepForecast:
    """The cost of a step, what each path adds to it, and from how many tasks `shared` pays."""

    step: Step
    base: StepCost
    paths: dict[str, StepCost]
    break_even_kept: int | None
    break_even_not_kept: int | None


def forecast(
    model: ModelShape, step: Step, size: AdapterSize, device: DeviceLimits
) -> StepForecast:
    """Predict one step on one device, with adapters on every projection of the model."""
    return StepForecast(
        step=step,
        base=StepCost.of(base_products(model, step), device),
        paths={
            name: StepCost.of(adapter_products(path, model, step, size), device)
            for name, path in PATHS.items()
        },
        break_even_kept=break_even(separate, model, step, size, device),
        break_even_not_kept=break_even(composed_anew, model, step, size, device),
    )


def predict_layer(
    d_in: int,
    d_out: int,
    *,
    tokens: int,
    distinct: int,
    experts: int,
    rank: int,
    device: DeviceLimits,
) -> dict[str, float]:
    """Seconds that one linear layer takes: `base`, and what `shared` and `composed` add to it."""
    layer, step = Projection("layer", d_in, (d_out,)), Step(tokens, distinct)
    size = AdapterSize(experts, rank)
    products = {
        "base": [base_projection(layer, tokens)],
        "shared": shared(layer, step, size),
        "composed": separate(layer, step, size),
    }
    return {name: StepCost.of(each, device).seconds for name, each in products.items()}


@dataclass(frozen=True)
class Footprint:
    """The bytes that a method takes beside the base model."""

    experts: int  # on the device, once
    slot: int  # on the device, for each slot
    stored: int  # in files, for each task


def footprints(model: ModelShape, size: AdapterSize) -> dict[str, Footprint]:
    """The memory of each method: a slot is a row of the routing table, a stored task its router.

    In numbers, with M modules and sums over them: rank space has `E r (d_in + d_out)` in experts
    and `M E` in a row; tensorpoly-2 `E N r (q_in + q_out)` and `M N E`; static trex
    `r (d_in + d_out)` and `M r^2`; LoRA no experts, and `r (d_in + d_out)` for each task, on the
    device and stored.
    """
    modules, sides = len(model.modules), size.rank * model.sides

    def routed(expert_bytes: int, row: int) -> Footprint:
        return Footprint(expert_bytes, BYTES * modules * row, FLOAT32_BYTES * modules * row)

    leaves = sum(leaf_size(side, size.order) for module in model.modules for side in module)
    mixed = size.experts * size.order
    return {
        "poly, tensorpoly-1": routed(BYTES * size.experts * sides, size.experts),
        "tensorpoly-2": routed(FLOAT32_BYTES * mixed * size.rank * leaves, mixed),
        "trex static": routed(BYTES * sides, size.rank**2),
        "separate LoRAs": Footprint(0, BYTES * sides, BYTES * sides),
    }
