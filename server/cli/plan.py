"""`polyrex plan`: memory and speed, predicted from shapes alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from cyclopts import ArgumentCollection, Group, Parameter
from cyclopts.types import NonNegativeInt, PositiveFloat, PositiveInt

from polyrex.kernels.roofline.model_shapes import MODELS
from polyrex.kernels.roofline.roofline import (
    GPUS,
    AdapterSize,
    DeviceLimits,
    Step,
    footprints,
    forecast,
)
from polyrex.kernels.roofline.training import TrainStep
from polyrex.server.config import VllmEngineConfig
from polyrex.server.launch.model_shape import PlanError, model_shape, unknown_name

from .plan_serving import Deployment, print_deployment

CPU = "cpu"


@dataclass(frozen=True)
class TrainingOptions:
    """What a training run is predicted for; options have the names that `polyrex train` has.

    Their types are written out: importing those of the adapters takes longer than a prediction.
    """

    train: Annotated[bool, Parameter(negative=())] = False
    """Predict training, on every device of a run, instead of serving."""
    method: str = "tensorpoly-1"
    """The adapter method."""
    form: Literal["mix", "diagonal", "static"] = "mix"
    """Form of trex."""
    batch_rows: PositiveInt = 16
    """Rows of a step, on all devices."""
    row_tokens: PositiveInt = 128
    """Tokens of a row, the longest of its batch, with its answer."""
    answer_tokens: PositiveInt = 8
    """Tokens of an answer."""
    accumulate: PositiveInt = 1
    """Parts that a step's rows are split into."""
    gradient_checkpointing: bool = False
    """Compute each layer's activations again for its gradients, instead of keeping them."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type that the model computes in."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Bits of the frozen layers' weights."""
    devices: PositiveInt = 1
    """Devices that share a step's rows."""

    def step(self) -> TrainStep:
        return TrainStep(
            rows=self.batch_rows,
            tokens=self.row_tokens,
            answers=self.answer_tokens,
            accumulate=self.accumulate,
            devices=self.devices,
            checkpointing=self.gradient_checkpointing,
        )


def _of_one_kind(arguments: ArgumentCollection) -> None:
    """Refuse options that `--train`, or its absence, leaves without a meaning: PlanError."""
    given = [argument for argument in arguments if argument.tokens]
    trains = any(argument.name == "--train" for argument in given)
    for argument in given:
        groups = argument.parameter.group
        assert isinstance(groups, tuple)
        if not trains and TRAINING in groups:
            raise PlanError(f"{argument.name} needs --train")
        if trains and SERVING in groups:
            raise PlanError(f"{argument.name} is of a deployment, which --train is not")


SERVING = Group("Deployment", sort_key=1)
TRAINING = Group("Training", sort_key=2)
EITHER = Group("Either", show=False, validator=_of_one_kind)
NO_TRAINING = TrainingOptions()


def plan(
    *,
    model: Annotated[
        str, Parameter(help=f"A folder with a config.json, or one of {', '.join(MODELS)}.")
    ],
    gpu: Annotated[str, Parameter(help=f"{', '.join(GPUS)}, or {CPU}, which is measured.")],
    tasks: Annotated[PositiveInt, Parameter(help="Registered tasks.")] = 1000,
    experts: Annotated[PositiveInt, Parameter(help="Experts E of a module.")] = 8,
    rank: Annotated[PositiveInt, Parameter(help="LoRA rank r; I and J of static trex.")] = 16,
    order: Annotated[PositiveInt, Parameter(help="Tensor order N.")] = 2,
    slots: Annotated[
        PositiveInt,
        Parameter(help="Rows of the routing table on the device.", group=(SERVING, EITHER)),
    ] = VllmEngineConfig.slots,
    batch: Annotated[
        PositiveInt, Parameter(help="Requests that decode together.", group=(SERVING, EITHER))
    ] = 32,
    distinct: Annotated[
        PositiveInt | None,
        Parameter(help="Distinct tasks of a step; one for each request if not given."),
    ] = None,
    context: Annotated[
        NonNegativeInt,
        Parameter(help="Cached tokens of a decoding request.", group=(SERVING, EITHER)),
    ] = 512,
    reuse: Annotated[
        PositiveInt,
        Parameter(
            help="Decode steps that composed weights serve if not kept.", group=(SERVING, EITHER)
        ),
    ] = Step.reuse,
    prompts: Annotated[
        PositiveInt, Parameter(help="Prompts of a prefill step.", group=(SERVING, EITHER))
    ] = 4,
    prompt_tokens: Annotated[
        PositiveInt, Parameter(help="Tokens of a prompt.", group=(SERVING, EITHER))
    ] = 512,
    bandwidth_gbs: Annotated[
        PositiveFloat | None, Parameter(help="GB/s that the device reaches.")
    ] = None,
    tflops: Annotated[
        PositiveFloat | None, Parameter(help="bfloat16 TFLOP/s that the device reaches.")
    ] = None,
    training: Annotated[
        TrainingOptions, Parameter(name="*", group=(TRAINING, EITHER))
    ] = NO_TRAINING,
    as_json: Annotated[
        bool, Parameter(name="--json", help="Print one JSON document.", negative=())
    ] = False,
) -> None:
    """Predict memory, the cost of a step on every path, and where the shared path begins to pay.

    A roofline: lower bounds from bytes and operations, in bfloat16, with adapters on every
    projection. Small operations are not in it. With --train, the memory of a training run.
    """
    gpu = gpu.lower()
    shape = model_shape(model)
    device = device_limits(gpu, bandwidth_gbs, tflops)
    size = AdapterSize(experts, rank, order)
    most = min(tasks, distinct or tasks)
    if training.train:
        from .plan_training import print_training, sized, training_plan  # imports PyTorch

        run = training_plan(
            model, gpu, shape=shape, device=device, step=training.step(), tasks=tasks,
            spec=sized(training.method, training.form, size), distinct=most, dtype=training.dtype,
            quantize=training.quantize,
        )  # fmt: skip
        _show(run.document(), lambda: print_training(run), as_json=as_json)
        return
    steps = {
        "decode": Step(batch, min(batch, most), batch, context, reuse),
        "prefill": Step(prompts * prompt_tokens, min(prompts, most), prompts),
    }
    deployment = Deployment(
        model, gpu, shape, device, size, tasks, min(slots, tasks), footprints(shape, size),
        {name: forecast(shape, step, size, device) for name, step in steps.items()},
    )  # fmt: skip
    _show(deployment.document(), lambda: print_deployment(deployment), as_json=as_json)


def _show(document: dict[str, Any], tables: Callable[[], None], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        tables()


def device_limits(name: str, bandwidth_gbs: float | None, tflops: float | None) -> DeviceLimits:
    """The speed that a device reaches; given figures replace its own.

    The CPU is measured, unless both are given. Raises PlanError.
    """
    given: dict[str, float] = {}
    if bandwidth_gbs is not None:
        given["bandwidth"] = bandwidth_gbs * 1e9
    if tflops is not None:
        given["flops"] = tflops * 1e12
    if name in GPUS:
        return replace(GPUS[name], **given)
    if name != CPU:
        raise unknown_name("gpu", name, [*GPUS, CPU])
    if len(given) == 2:
        return DeviceLimits(**given)
    from polyrex.kernels.roofline.device_limits import measure_device

    return replace(measure_device(), **given)
