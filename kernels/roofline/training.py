"""The memory and the least time of a training step, from shapes alone.

On each device, a step's rows pass through the frozen model in parts of B rows of T tokens, n = B T.
Autograd keeps what the backward pass reads: a frozen product reads only its weight again, so that
its input is kept only where an adapter reads it. All sizes are bytes of one device; what a library
needs beside tensors is left out. What one module's adapter takes is given (`ModuleCost`), as
methods know it (adapters/model/training_cost.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from .model_shapes import ModelShape, Projection
from .roofline import (
    BYTES,
    FLOAT32_BYTES,
    DeviceLimits,
    Product,
    Step,
    StepCost,
    attention,
    base_projection,
)


@dataclass(frozen=True)
class ModuleCost:
    """What the adapter of one module takes in the forward pass of a part."""

    d_in: int
    d_out: int
    parameters: int  # a count of numbers
    derived: int  # bytes kept from composing the rows' adapters
    operands: int  # bytes of these adapters, which the layer reads
    own: int  # bytes kept from the layer's own products, beside its input
    reads_input: bool  # whether the layer's input is kept for it
    compose_flops: int
    layer_flops: int


@dataclass(frozen=True)
class TrainStep:
    """The rows of a step on all devices, and how they pass through the model."""

    rows: int
    tokens: int
    """T, of each row."""
    answers: int
    """Tokens of a row whose logits are computed."""
    accumulate: int = 1
    """Parts that a device's rows are split into."""
    devices: int = 1
    checkpointing: bool = False
    """Whether only the inputs of decoder layers are kept, and the rest is computed again."""

    @property
    def rows_of_device(self) -> int:
        return ceil(self.rows / self.devices)

    @property
    def rows_of_part(self) -> int:
        """B."""
        return ceil(self.rows_of_device / self.accumulate)

    @property
    def parts(self) -> int:
        return ceil(self.rows_of_device / self.rows_of_part)


@dataclass(frozen=True)
class FrozenModel:
    """A base model in training, and how it computes."""

    shape: ModelShape
    number: int
    """Bytes of a number in the dtype that it computes in."""
    weight: float
    """Bytes of a number in a projection's weight: less than `number` if they are quantised."""
    fused_attention: bool
    """Whether attention's probabilities are never written, or kept in float32."""

    @property
    def bytes(self) -> float:
        linear = sum(d_in * d_out for d_in, d_out in self.shape.modules)
        return self.weight * linear + self.number * (self.shape.parameters - linear)

    @property
    def unpacked(self) -> float:
        """The largest projection's weight, which a quantised one is made into to be multiplied."""
        largest = max(d_in * d_out for d_in, d_out in self.shape.modules)
        return self.number * largest if self.weight < self.number else 0


@dataclass(frozen=True)
class TrainMemory:
    """The memory of a training step on one device."""

    parts: dict[str, float]
    """What there is; not all of it at the same time."""
    moments: dict[str, float]
    """All that is there at each of the moments that may be the peak."""

    @property
    def peak_at(self) -> str:
        return max(self.moments, key=lambda moment: self.moments[moment])

    @property
    def peak(self) -> float:
        return self.moments[self.peak_at]


def layer_activations(
    model: FrozenModel, modules: Sequence[ModuleCost], rows: int, tokens: int
) -> float:
    """What one decoder layer keeps of B rows of T tokens.

    Two norms keep their inputs in float32, the MLP its gate, the gate's SiLU and up. Attention
    keeps queries, keys and values; where it is not fused, keys and values once for every query
    head, and the probabilities: in float32, and in the dtype of the values.
    """
    shape, n = model.shape, rows * tokens
    width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    reading = {(module.d_in, module.d_out) for module in modules if module.reads_input}
    kept = 3 * shape.intermediate + sum(
        projection.d_in
        for projection in shape.projections
        if any((projection.d_in, d_out) in reading for d_out in projection.outputs)
    )
    if model.fused_attention:
        kept += width + 2 * kv_width
        attended = n * shape.heads * FLOAT32_BYTES  # the logarithm of each softmax's sum
    else:
        kept += 3 * width
        copies = FLOAT32_BYTES + (model.number if model.number != FLOAT32_BYTES else 0)
        attended = n * tokens * shape.heads * copies
    norms = 2 * n * shape.hidden * FLOAT32_BYTES
    return norms + n * kept * model.number + attended + sum(module.own for module in modules)


def train_memory(
    model: FrozenModel, modules: Sequence[ModuleCost], routing: int, step: TrainStep
) -> TrainMemory:
    """The memory of a step with AdamW in float32; `routing` counts the numbers of all routers.

    `modules` are those of one decoder layer, and adapters are on all layers. The peak may be:

    - `loss`: everything is kept, and the softmax over the vocabulary is there three times;
    - `last layer`: the first of the backward pass: three tensors of the MLP pass through it;
    - `first layer`: the last of it: the gradients of all rows' adapters are there beside them;
    - `composing`: these become the parameters' gradients;
    - `update`: AdamW; devices also hold their gradients once more, to add them up.
    """
    shape, rows = model.shape, step.rows_of_part
    n = rows * step.tokens
    trained = FLOAT32_BYTES * (routing + shape.layers * sum(m.parameters for m in modules))
    derived = shape.layers * sum(m.derived for m in modules)
    operands = shape.layers * sum(m.operands for m in modules)
    layer = layer_activations(model, modules, rows, step.tokens)
    inputs = n * shape.hidden * model.number
    activations = shape.layers * (inputs if step.checkpointing else layer)
    passing = 3 * n * shape.intermediate * model.number
    logits = 3 * FLOAT32_BYTES * rows * step.answers * shape.vocabulary
    fixed = model.bytes + 3 * trained
    earlier = trained if step.parts > 1 else 0  # the gradients of the parts before
    computing = fixed + earlier + model.unpacked + derived + operands
    return TrainMemory(
        parts={
            "base model": model.bytes,
            "trained parameters": trained,
            "their gradients": trained,
            "AdamW's moments": 2 * trained,
            "adapters of the rows": derived + operands,
            "activations": activations,
            "logits": logits,
        },
        moments={
            "loss": computing + activations + logits,
            "last layer": computing + activations + passing + layer * step.checkpointing,
            "first layer": computing + operands + layer + passing,
            "composing": fixed + derived + trained,
            "update": fixed + trained * (2 if step.devices > 1 else 1),
        },
    )


def train_cost(
    model: FrozenModel, modules: Sequence[ModuleCost], routing: int, step: TrainStep,
    device: DeviceLimits,
) -> StepCost:  # fmt: skip
    """The least time of a step on one device, as roofline.py has it; adding up is not in it."""
    products = _part_products(model, modules, step) * step.parts
    trained = routing + model.shape.layers * sum(m.parameters for m in modules)
    # reads value, gradient and moments, writes value and moments
    update = Product("update", 0, 7 * FLOAT32_BYTES * trained)
    return StepCost.of([*products, update], device)


def _part_products(
    model: FrozenModel, modules: Sequence[ModuleCost], step: TrainStep
) -> list[Product]:
    """Forward and backward: a frozen product once each, as its weight has no gradient; the others
    once and twice. With checkpointing, layers go forward twice."""
    shape, rows = model.shape, step.rows_of_part
    n = rows * step.tokens
    frozen = 3 if step.checkpointing else 2
    layer = [base_projection(projection, n) for projection in shape.projections] * frozen
    layer += [attention(shape, Step(n, 1, rows))] * (frozen + 1)
    for module in modules:
        moved = BYTES * n * (module.d_in + 2 * module.d_out) + module.operands
        layer += [Product("adapters", module.layer_flops, moved)] * (frozen + 1)
        composed = FLOAT32_BYTES * module.parameters + module.derived + module.operands
        layer += [Product("composing", module.compose_flops, composed)] * 3
    head = Projection("lm_head", shape.hidden, (shape.vocabulary,))
    return layer * shape.layers + [base_projection(head, rows * step.answers)] * 2
