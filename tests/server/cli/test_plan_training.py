"""`polyrex plan --train`."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch

from bench.cases import MAIN, OTHERS
from bench.gpu.subjects.random_model import random_llama
from bench.train_memory import Case
from polyrex.adapters.model.base_model import Quantisation
from polyrex.adapters.model.parameter_counts import base_targets, count_parameters
from polyrex.adapters.model.training_cost import adapter_costs
from polyrex.adapters.spec import AdapterSpec, TrexForm
from polyrex.kernels.roofline.model_shapes import MODELS, ModelShape
from polyrex.kernels.roofline.training import TrainStep
from polyrex.server.cli.plan import TrainingOptions
from polyrex.training.loop.run import LoopConfig
from polyrex.training.train import TrainConfig
from support.command_line import polyrex

SPECS = MAIN | OTHERS
TINY = ModelShape(2, 64, 160, heads=4, kv_heads=2, head_dim=16, vocabulary=300, tied=True)
STEP = TrainStep(rows=6, tokens=24, answers=3)
LLAMA = ("--model", "llama-3.1-8b", "--gpu", "h100", "--train")


def document(*arguments: str) -> Any:
    done = polyrex("plan", *LLAMA, *arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def ratio(case: Case, *, attention: str = "eager") -> float:
    """What is predicted, as a share of what a run takes."""
    base: Any = random_llama(case.shape, torch.device("cpu"), case.dtype)
    base.set_attn_implementation(attention)
    return case.predicted().peak / case.measured(base)


@pytest.mark.parametrize("name", SPECS)
def test_every_method_takes_what_is_predicted(name: str) -> None:
    case = Case(TINY, SPECS[name], STEP, torch.bfloat16, tasks=5)
    assert 0.8 < ratio(case) < 1.2


@pytest.mark.parametrize(
    "step",
    [
        STEP,
        replace(STEP, checkpointing=True),
        replace(STEP, accumulate=3),
        replace(STEP, tokens=100),
        replace(STEP, rows=2, tokens=6),
    ],
    ids=["float32", "checkpointing", "accumulate", "long", "short"],
)
def test_every_kind_of_step_takes_what_is_predicted(step: TrainStep) -> None:
    assert 0.8 < ratio(Case(TINY, SPECS["tensorpoly-1"], step, torch.float32, tasks=5)) < 1.2


def test_fused_attention_takes_what_is_predicted() -> None:
    step = replace(STEP, tokens=100)
    case = Case(TINY, SPECS["tensorpoly-1"], step, torch.bfloat16, 5, fused_attention=True)
    assert 0.8 < ratio(case, attention="sdpa") < 1.2


def test_a_prediction_of_another_run_is_seen() -> None:
    case = Case(TINY, SPECS["lora"], replace(STEP, tokens=100), torch.bfloat16, tasks=5)
    measured = case.predicted().peak / ratio(case)
    assert replace(case, fused_attention=True).predicted().peak < 0.8 * measured
    again = replace(case, step=replace(case.step, checkpointing=True))
    assert again.predicted().peak < 0.8 * measured
    other = replace(case, spec=SPECS["trex-mix"])
    assert other.predicted().peak > 1.2 * measured


@pytest.mark.parametrize("name", SPECS)
def test_trained_numbers_are_those_of_polyrex_params(name: str) -> None:
    shape = MODELS["HuggingFaceTB/SmolLM2-135M"]
    costs = adapter_costs(SPECS[name], shape, STEP, tasks=3, distinct=3, dtype=torch.bfloat16)
    counted = count_parameters(SPECS[name], base_targets("smollm2-135m-instruct"), tasks=3)
    assert costs.parameters(shape) == counted.multi_task


def test_intuition_is_one_map_and_a_router_for_the_model() -> None:
    spec = AdapterSpec("trex", rank=4, intuition=32, granularity="model")
    costs = adapter_costs(spec, TINY, STEP, tasks=3, distinct=3, dtype=torch.bfloat16)
    assert costs.routing == 3 * 32 + 32 * 16


def test_options_reach_the_prediction() -> None:
    line = (
        "--method trex --form static --rank 4 --tasks 9 --batch-rows 30 --row-tokens 50"
        " --answer-tokens 7 --accumulate 2 --devices 3 --quantize 4bit --gradient-checkpointing"
    )
    found = document(*line.split())
    assert found["step"] == {
        "rows": 30, "tokens": 50, "answers": 7, "accumulate": 2, "devices": 3,
        "checkpointing": True,
    }  # fmt: skip
    assert (found["spec"]["method"], found["spec"]["form"]) == ("trex", "static")
    assert (found["spec"]["rank"], found["spec"]["experts"]) == (4, 1)
    assert (found["tasks"], found["distinct"], found["weights"]) == (9, 5, "4bit")
    assert document(*line.split(), "--distinct", "2")["distinct"] == 2


def test_the_peak_is_one_of_the_moments() -> None:
    found = document("--method", "poly", "--gradient-checkpointing")
    assert found["peak_bytes"] == found["memory"]["moments"][found["peak_at"]]
    assert found["peak_bytes"] == max(found["memory"]["moments"].values())
    assert found["rows_per_second"] == 16 / found["cost"]["seconds"]


def test_smaller_weights_and_more_parts_take_less() -> None:
    lines = ("", "--quantize 8bit", "--quantize 4bit", "--quantize 4bit --accumulate 4")
    sizes = [document(*line.split())["peak_bytes"] for line in lines]
    assert sizes == sorted(sizes, reverse=True)
    assert document("--dtype", "float32")["memory"]["parts"]["base model"] == pytest.approx(
        2 * document()["memory"]["parts"]["base model"]
    )


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--batch-rows", "4"], "--batch-rows needs --train"),
        (["--train", "--slots", "4"], "--slots is of a deployment"),
        (["--train", "--method", "lara"], "no adapter method 'lara'"),
        (["--train", "--method", "lora", "--form", "static"], "lora has no form"),
    ],
)
def test_options_without_a_meaning_are_refused(arguments: list[str], why: str) -> None:
    done = polyrex("plan", "--model", "llama-3.1-8b", "--gpu", "h100", *arguments)
    assert done.exit_code == 2
    assert why in done.stderr


def test_options_are_those_of_polyrex_train() -> None:
    ours, trained = TrainingOptions(), get_type_hints(TrainConfig)
    assert ours.batch_rows == LoopConfig.batch_rows
    assert ours.accumulate == LoopConfig.accumulate
    assert (ours.dtype, ours.quantize) == (TrainConfig.dtype, TrainConfig.quantize)
    assert ours.gradient_checkpointing == TrainConfig.gradient_checkpointing
    hints = get_type_hints(TrainingOptions)
    assert hints["dtype"] == trained["dtype"]
    assert hints["form"] == TrexForm
    assert set(get_args(get_args(hints["quantize"])[0])) == set(get_args(Quantisation))
