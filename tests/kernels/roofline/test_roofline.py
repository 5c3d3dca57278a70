"""The roofline model, against numbers worked out by hand and against the adapters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from polyrex.adapters.methods.registry import make_experts, method_class
from polyrex.adapters.model.parameter_counts import base_targets, count_parameters
from polyrex.adapters.spec import AdapterSpec, TargetModule
from polyrex.kernels.roofline import device_limits, roofline
from polyrex.kernels.roofline.model_shapes import MODELS, ModelShape, Projection
from polyrex.kernels.roofline.roofline import (
    GPUS,
    PATHS,
    AdapterSize,
    DeviceLimits,
    Product,
    ServingPath,
    Step,
    StepCost,
    adapter_products,
    break_even,
    footprints,
    forecast,
    predict_layer,
)

LAYER = Projection("layer", 4, (6,))
STEP = Step(tokens=3, distinct=2)
SIZE = AdapterSize(experts=2, rank=1)
SLOW_MEMORY, SLOW_MULTIPLIER = DeviceLimits(10, 1e9), DeviceLimits(1e9, 10)
LLAMA_8B, SMOLLM2 = MODELS["meta-llama/Llama-3.1-8B"], MODELS["HuggingFaceTB/SmolLM2-135M"]
DECODE = Step(tokens=32, distinct=32, sequences=32, context=512)
ONE_EACH = Step(tokens=64, distinct=64, sequences=64)


def seconds(path: str, model: ModelShape, step: Step, device: DeviceLimits) -> float:
    size = AdapterSize(experts=8, rank=16)
    return StepCost.of(adapter_products(PATHS[path], model, step, size), device).seconds


# By hand, for x [3, 4] and W [6, 4], E = 2, r = 1, two tasks, two bytes a number:
# base      flops 2*3*4*6 = 144            bytes 2*(24 + 3*(4+6)) = 108
# shared    flops 2*3*2*4 = 48, 2*3*2*6 = 72   bytes 2*(8 + 3*(4+2)) = 52, 2*(12 + 3*(2+12)) = 108
# composed  flops 2*3*1*4 = 24, 2*3*1*6 = 36   bytes 2*(2*4 + 3*(4+1)) = 46,
#                                                    2*(2*6 + 3*(1+12)) = 102
@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (SLOW_MEMORY, {"base": 10.8, "shared": 5.2 + 10.8, "composed": 4.6 + 10.2}),
        (SLOW_MULTIPLIER, {"base": 14.4, "shared": 4.8 + 7.2, "composed": 2.4 + 3.6}),
    ],
)
def test_one_layer_costs_what_it_does_by_hand(
    device: DeviceLimits, expected: dict[str, float]
) -> None:
    found = predict_layer(4, 6, tokens=3, distinct=2, experts=2, rank=1, device=device)
    assert found == pytest.approx(expected)


def test_the_output_side_costs_more_than_the_input_side() -> None:
    # y is read and written, x only read: sides that are swapped must not pass for each other
    settings = {"tokens": 3, "distinct": 2, "experts": 2, "rank": 1}
    wide_out = predict_layer(4, 6, **settings, device=SLOW_MEMORY)
    wide_in = predict_layer(6, 4, **settings, device=SLOW_MEMORY)
    assert wide_out["base"] == wide_in["base"]
    assert wide_out["shared"] > wide_in["shared"]


def test_each_product_is_bound_by_its_own_limit() -> None:
    device = DeviceLimits(bandwidth=2, flops=10)
    products = [Product("A side", 100, 2), Product("B side", 10, 8), Product("A side", 30, 1)]
    cost = StepCost.of(products, device)
    assert cost.parts == {"A side": 13, "B side": 4}
    assert (cost.seconds, cost.flops, cost.bytes, cost.products) == (17, 140, 11, 3)


def test_composing_reads_the_inventory_and_writes_every_task() -> None:
    # 2 tasks * 2 experts * (4 + 6) numbers, multiplied and added; (2 + 2) * 10 numbers moved
    assert roofline.compose(LAYER, STEP, SIZE) == Product("compose", 80, 80)
    assert roofline.compose(LAYER, replace(STEP, reuse=4), SIZE) == Product("compose", 20, 20)


def test_trex_core_is_read_once_for_each_task() -> None:
    # rank 2: 2*3*4 flops; two cores of 4 numbers, 3 tokens of 2 in and out
    core = roofline.trex_static(LAYER, STEP, AdapterSize(experts=1, rank=2))[-1]
    assert core == Product("core", 24, 2 * (2 * 4 + 2 * 3 * 2), launches=0)


def test_tensorpoly_2_costs_what_it_does_by_hand() -> None:
    # d_in 4 is 2 x 2, d_out 9 is 3 x 3; two orders, two experts: 2*2*(2+3) = 20 numbers of leaves
    mix, side_a, side_b = roofline.tensorpoly_2(Projection("layer", 4, (9,)), STEP, SIZE)
    assert mix == Product("mix", 2 * 2 * 20, 4 * (20 + 2 * (2 + 2) + 2 * (3 + 3)), launches=0)
    assert side_a == Product("A side", 2 * 3 * 2 * (2 + 1), 4 * 2 * 4 + 2 * 3 * (4 + 1))
    assert side_b == Product("B side", 2 * 3 * 3 * (3 + 1), 4 * 2 * 6 + 2 * 3 * (1 + 2 * 9))


def test_launches_take_time_on_a_gpu() -> None:
    products = [Product("A side", 100, 2), Product("B side", 10, 8, launches=0)]
    cost = StepCost.of(products, DeviceLimits(bandwidth=2, flops=10, launch_seconds=5))
    assert cost.parts == {"A side": 10 + 5, "B side": 4}
    assert cost.launches == 1


@pytest.mark.parametrize("path", PATHS)
def test_a_packed_layer_launches_two_kernels(path: str) -> None:
    packed = PATHS[path](Projection("packed", 4, (6, 5, 5)), STEP, SIZE)
    composing = 1 if path == "composed, not kept" else 0
    assert sum(product.launches for product in packed) == 2 + composing


def test_a_cpu_launches_nothing() -> None:
    assert DeviceLimits(1, 1).launch_seconds == 0
    assert all(device.launch_seconds > 0 for device in GPUS.values())


def test_a_card_reaches_what_is_taken_of_its_data_sheet() -> None:
    found, sheet = GPUS["h100-measured"], GPUS["h100"]
    assert sheet.bandwidth < found.bandwidth < sheet.bandwidth / roofline.EFFICIENCY
    assert sheet.flops < found.flops < sheet.flops / roofline.EFFICIENCY


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_packed_layers_read_their_input_once(path: ServingPath) -> None:
    packed = path(Projection("packed", 4, (6, 5)), STEP, SIZE)
    apart = [
        product
        for d_out in (6, 5)
        for product in path(Projection("alone", 4, (d_out,)), STEP, SIZE)
    ]
    assert sum(p.flops for p in packed) == sum(p.flops for p in apart)
    assert sum(p.bytes for p in apart) - sum(p.bytes for p in packed) == 2 * 3 * 4


def test_attention_reads_the_cache_and_multiplies_causally() -> None:
    model = ModelShape(1, 8, 16, heads=4, kv_heads=2, head_dim=2, vocabulary=10, tied=True)
    decode = roofline.attention(model, Step(3, 3, sequences=3, context=5))
    # 3 queries on 6 keys of 8 numbers; 18 keys and values of 4; queries and outputs
    assert decode == Product("attention", 4 * 8 * 18, 2 * (2 * 4 * 18 + 2 * 3 * 8))
    prefill = roofline.attention(model, Step(6, 2, sequences=2))
    # in each of two prompts, 1 + 2 + 3 pairs
    assert prefill == Product("attention", 4 * 8 * 12, 2 * (2 * 4 * 6 + 2 * 6 * 8))


def test_base_step_reads_every_weight_once() -> None:
    step = Step(tokens=1, distinct=1)
    cost = StepCost.of(roofline.base_products(LLAMA_8B, step), GPUS["h100"])
    weights = 2 * (LLAMA_8B.parameters - LLAMA_8B.vocabulary * LLAMA_8B.hidden)  # no embedding
    assert weights < cost.bytes < 1.001 * weights
    assert cost.flops == pytest.approx(weights, rel=0.001)
    assert cost.launches == 32 * 5 + 1
    launching = cost.launches * GPUS["h100"].launch_seconds
    assert cost.seconds == pytest.approx(cost.bytes / GPUS["h100"].bandwidth + launching)


@pytest.mark.parametrize("device", [*GPUS.values(), SLOW_MULTIPLIER], ids=[*GPUS, "slow"])
@pytest.mark.parametrize("model", [LLAMA_8B, SMOLLM2], ids=["8b", "135m"])
def test_shared_does_not_depend_on_tasks_and_composed_never_falls(
    model: ModelShape, device: DeviceLimits
) -> None:
    def costs(path: str) -> list[float]:
        return [
            seconds(path, model, replace(DECODE, distinct=tasks), device) for tasks in range(1, 33)
        ]

    assert len(set(costs("shared"))) == 1
    assert costs("composed") == sorted(costs("composed"))
    assert costs("composed, not kept") == sorted(costs("composed, not kept"))


def test_composed_grows_with_every_task_where_memory_decides() -> None:
    costs = [
        seconds("composed", LLAMA_8B, replace(DECODE, distinct=tasks), GPUS["h100"])
        for tasks in range(1, 33)
    ]
    assert len(set(costs)) == 32


@pytest.mark.parametrize("experts", [4, 8, 16, 32])
def test_break_even_is_near_the_experts_where_memory_decides(experts: int) -> None:
    size = AdapterSize(experts, rank=16)
    found = break_even(roofline.separate, LLAMA_8B, ONE_EACH, size, GPUS["h100"])
    assert found in (experts + 1, experts + 2)


@pytest.mark.parametrize("path", [roofline.separate, roofline.composed_anew])
@pytest.mark.parametrize("device", [GPUS["l40s"], DeviceLimits(20e9, 0.5e12)])
def test_break_even_is_the_first_dearer_mix(path: ServingPath, device: DeviceLimits) -> None:
    size = AdapterSize(experts=5, rank=3)

    def cost(path: ServingPath, distinct: int) -> float:
        step = replace(ONE_EACH, distinct=distinct)
        return StepCost.of(adapter_products(path, SMOLLM2, step, size), device).seconds

    dearer = [tasks for tasks in range(1, 65) if cost(path, tasks) > cost(roofline.shared, 1)]
    assert break_even(path, SMOLLM2, ONE_EACH, size, device) == dearer[0]


def test_without_enough_tokens_there_is_no_break_even() -> None:
    few = Step(tokens=4, distinct=4, sequences=4)
    predicted = forecast(LLAMA_8B, few, AdapterSize(8, 16), GPUS["h100"])
    assert predicted.break_even_kept is None
    assert predicted.break_even_not_kept == 1


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-3.2-3B", 3_212_749_824),
        ("mistralai/Mistral-7B-v0.3", 7_248_023_552),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B", 70_553_706_496),
    ],
)
def test_shapes_give_the_published_parameter_counts(name: str, parameters: int) -> None:
    # norms and biases are left out: always a little less
    assert 0 < parameters - MODELS[name].parameters < 1e-3 * parameters


def test_keys_and_values_of_a_token() -> None:
    assert 2 * LLAMA_8B.kv_numbers == 131_072
    assert 2 * SMOLLM2.kv_numbers == 23_040


@pytest.mark.parametrize(
    ("row", "spec", "stored_bytes"),
    [
        ("poly, tensorpoly-1", AdapterSpec("poly", rank=6, experts=5), 2),
        ("tensorpoly-2", AdapterSpec("tensorpoly-2", rank=6, experts=5), 4),
        ("tensorpoly-2", AdapterSpec("tensorpoly-2", rank=6, experts=5, order=4), 4),
        ("trex static", AdapterSpec("trex", rank=6, form="static"), 2),
        ("separate LoRAs", AdapterSpec("lora", rank=6), 2),
    ],
    ids=lambda value: value.method if isinstance(value, AdapterSpec) else "",
)
def test_footprints_are_those_of_the_adapters(
    row: str, spec: AdapterSpec, stored_bytes: int
) -> None:
    targets = base_targets("smollm2-135m-instruct")
    counts = count_parameters(spec, targets, tasks=1)
    gates = counts.modules if spec.method == "tensorpoly-2" else 0
    size = AdapterSize(experts=5, rank=6, order=spec.order)
    found = footprints(SMOLLM2, size)[row]
    if spec.method == "lora":
        assert (found.experts, found.slot, found.stored) == (0, *[2 * counts.experts] * 2)
        return
    assert found.experts == stored_bytes * (counts.experts - gates)
    assert found.slot == 2 * counts.modules * method_class(spec.method).table_size(spec)
    assert found.stored == 4 * counts.routing_per_task


def test_tensorpoly_1_serves_the_operands_that_its_footprint_counts() -> None:
    one_layer = ModelShape(1, 6, 10, heads=3, kv_heads=1, head_dim=2, vocabulary=7, tied=True)
    spec = AdapterSpec("tensorpoly-1", rank=3, experts=5)
    operands = [
        tensor
        for number, (d_in, d_out) in enumerate(one_layer.modules)
        for tensor in make_experts(spec, TargetModule(str(number), d_in, d_out))(torch.bfloat16)
    ]
    expected = sum(tensor.numel() * tensor.itemsize for tensor in operands)
    found = footprints(one_layer, AdapterSize(experts=5, rank=3))["poly, tensorpoly-1"]
    assert found.experts == expected


def test_the_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_limits, "_READ_BYTES", 1 << 16)
    monkeypatch.setattr(device_limits, "_SIDE", 33)
    monkeypatch.setattr(device_limits, "_SECONDS", 0)
    found = device_limits.measure_device()
    assert 0 < found.bandwidth < float("inf")
    assert 0 < found.flops < float("inf")
    assert found.memory is None
