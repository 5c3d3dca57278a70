"""The memory and time of a training step, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polyrex.kernels.roofline.model_shapes import MODELS, ModelShape
from polyrex.kernels.roofline.roofline import GPUS, DeviceLimits, Step, StepCost, base_products
from polyrex.kernels.roofline.training import (
    FrozenModel,
    ModuleCost,
    TrainStep,
    layer_activations,
    train_cost,
    train_memory,
)

SHAPE = ModelShape(2, 4, 8, heads=3, kv_heads=1, head_dim=2, vocabulary=10, tied=True)
EAGER = FrozenModel(SHAPE, number=2, weight=2, fused_attention=False)
STEP = TrainStep(rows=2, tokens=3, answers=1)
NOTHING = ModuleCost(4, 6, 0, 0, 0, 0, reads_input=False, compose_flops=0, layer_flops=0)
ON_Q = replace(NOTHING, parameters=5, derived=7, operands=11, own=13, reads_input=True)
WEIGHTS = 2 * (4 * 6 + 2 * 4 * 2 + 6 * 4 + 3 * 4 * 8)  # q, k and v, o, MLP of two layers


# n = 6 tokens, two bytes a number. Norms: 2*6*4 in float32. Gate, SiLU and up of 8 each; q, k and v
# of 6. Probabilities: 6 * 3 tokens of 3 heads, in float32 and in bfloat16.
def test_a_layer_keeps_what_it_does_by_hand() -> None:
    expected = 4 * 2 * 6 * 4 + 2 * 6 * (3 * 8 + 3 * 6) + (4 + 2) * 6 * 3 * 3
    assert layer_activations(EAGER, [NOTHING], 2, 3) == expected
    # an adapter on q: the input of 4 that q, k and v share, and what is its own
    assert layer_activations(EAGER, [ON_Q], 2, 3) == expected + 2 * 6 * 4 + 13


def test_fused_attention_keeps_one_number_for_each_head() -> None:
    fused = replace(EAGER, fused_attention=True)
    saved = 2 * 6 * (3 * 6 - (6 + 2 * 2)) + (4 + 2) * 6 * 3 * 3 - 4 * 6 * 3
    before = layer_activations(EAGER, [NOTHING], 2, 3)
    assert layer_activations(fused, [NOTHING], 2, 3) == before - saved


def test_float32_probabilities_are_kept_once() -> None:
    wide = replace(EAGER, number=4, weight=4)
    expected = 4 * (2 * 6 * 4 + 6 * (3 * 8 + 3 * 6) + 6 * 3 * 3)
    assert layer_activations(wide, [NOTHING], 2, 3) == expected


def test_memory_is_what_it_is_by_hand() -> None:
    found = train_memory(EAGER, [ON_Q], 3, STEP)
    trained = 4 * (2 * 5 + 3)
    activations = 2 * layer_activations(EAGER, [ON_Q], 2, 3)
    assert found.parts == {
        "base model": 2 * (WEIGHTS + 40),
        "trained parameters": trained,
        "their gradients": trained,
        "AdamW's moments": 2 * trained,
        "adapters of the rows": 2 * (7 + 11),
        "activations": activations,
        "logits": 3 * 4 * 2 * 10,
    }
    fixed = 2 * (WEIGHTS + 40) + 3 * trained
    passing = 2 * 3 * 6 * 8
    assert found.moments == {
        "loss": fixed + 36 + activations + 240,
        "last layer": fixed + 36 + activations + passing,
        "first layer": fixed + 36 + 22 + activations / 2 + passing,
        "composing": fixed + 14 + trained,
        "update": fixed + trained,
    }
    assert found.peak == found.moments[found.peak_at]
    assert found.peak_at == "last layer"


def test_parts_keep_the_gradients_of_those_before() -> None:
    step = replace(STEP, rows=4)
    whole, parts = (
        train_memory(EAGER, [ON_Q], 3, each) for each in (step, replace(step, accumulate=2))
    )
    assert parts.moments["loss"] == train_memory(EAGER, [ON_Q], 3, STEP).moments["loss"] + 52
    assert parts.moments["update"] == whole.moments["update"]


def test_devices_share_rows_and_hold_their_gradients_twice() -> None:
    step = replace(STEP, rows=7, devices=2, accumulate=3)
    assert (step.rows_of_device, step.rows_of_part, step.parts) == (4, 2, 2)
    alone = train_memory(EAGER, [ON_Q], 3, replace(STEP, rows=4, accumulate=2))
    found = train_memory(EAGER, [ON_Q], 3, step)
    assert found.moments.pop("update") == alone.moments.pop("update") + 52
    assert found.moments == alone.moments


def test_checkpointing_keeps_inputs_of_layers_and_computes_one_again() -> None:
    plain = train_memory(EAGER, [ON_Q], 3, STEP)
    found = train_memory(EAGER, [ON_Q], 3, replace(STEP, checkpointing=True))
    layer = layer_activations(EAGER, [ON_Q], 2, 3)
    assert found.parts["activations"] == 2 * 2 * 6 * 4
    saved = 2 * layer - 2 * 2 * 6 * 4
    assert plain.moments["loss"] - found.moments["loss"] == saved
    assert plain.moments["last layer"] - found.moments["last layer"] == saved - layer


def test_quantised_projections_are_unpacked_one_at_a_time() -> None:
    quantised = replace(EAGER, weight=0.5)
    assert quantised.bytes == 0.5 * WEIGHTS + 2 * 40
    assert quantised.unpacked == 2 * 4 * 8
    assert EAGER.unpacked == 0


def test_a_frozen_product_goes_once_each_way() -> None:
    model = FrozenModel(MODELS["meta-llama/Llama-3.1-8B"], 2, 2, fused_attention=True)
    step = TrainStep(rows=16, tokens=128, answers=128)
    found = train_cost(model, [], 0, step, GPUS["h100"])
    forward = StepCost.of(base_products(model.shape, Step(2048, 16, 16)), GPUS["h100"])
    head, attention = found.parts["lm_head"], found.parts["attention"]
    assert attention == pytest.approx(3 * forward.parts["attention"])
    own = found.seconds - head - attention - found.parts["update"]
    rest = forward.seconds - forward.parts["lm_head"] - forward.parts["attention"]
    assert own == pytest.approx(2 * rest)
    again = train_cost(model, [], 0, replace(step, checkpointing=True), GPUS["h100"])
    assert again.seconds - found.seconds == pytest.approx(rest + attention / 3)


def test_adapters_go_once_forward_and_twice_backward() -> None:
    slow = DeviceLimits(bandwidth=1e12, flops=10)
    costly = replace(ON_Q, layer_flops=100, compose_flops=1000)
    parts = train_cost(EAGER, [costly], 3, replace(STEP, rows=4, accumulate=2), slow).parts
    assert parts["adapters"] == pytest.approx(2 * 2 * 3 * 10)
    assert parts["composing"] == pytest.approx(2 * 2 * 3 * 100)
    thin = DeviceLimits(bandwidth=1, flops=1e12)
    # 2 * 5 + 3 numbers: value, gradient and two moments are read, all but the gradient written
    assert train_cost(EAGER, [costly], 3, STEP, thin).parts["update"] == 4 * 7 * 13
