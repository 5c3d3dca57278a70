"""`polyrex plan`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MixtralConfig, OPTConfig, PretrainedConfig

from polyrex.kernels.roofline import device_limits
from polyrex.kernels.roofline.model_shapes import MODELS, ModelShape
from polyrex.kernels.roofline.roofline import GPUS, DeviceLimits
from polyrex.server.cli import plan as cli_plan
from polyrex.server.launch.model_shape import PlanError, model_shape
from support.command_line import polyrex

ROOT = Path(__file__).parents[3]
PLANNING = ROOT / "docs" / "planning.md"
TINY: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


def run(*arguments: str) -> str:
    done = polyrex("plan", *arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def refusal(*arguments: str) -> str:
    done = polyrex("plan", *arguments)
    assert done.exit_code == 2
    return done.stderr


def saved(config: PretrainedConfig, folder: Path) -> str:
    config.save_pretrained(folder)
    return str(folder)


def test_the_docs_show_what_the_command_prints() -> None:
    command = "polyrex plan --model meta-llama/Llama-3.1-8B --tasks 10000 --gpu h100"
    pages = [path.read_text() for path in (ROOT / "README.md", PLANNING) if path.exists()]
    (page,) = (page for page in pages if f"$ {command}\n" in page)
    shown = page.split(f"$ {command}\n")[1].split("```")[0]
    printed = [line.rstrip() for line in run(*command.split()[2:]).splitlines()]
    assert [line.rstrip() for line in shown.splitlines()] == printed


def test_json_holds_all_of_it() -> None:
    found = json.loads(
        run("--model", "llama-3.1-8b", "--gpu", "h100", "--tasks", "10000", "--json")
    )
    assert found["parameters"] == MODELS["meta-llama/Llama-3.1-8B"].parameters
    assert found["kv_bytes_per_token"] == 131_072
    assert found["slots"] == 1024
    assert found["footprints"]["poly, tensorpoly-1"]["slot"] == 224 * 8 * 2
    assert found["steps"]["decode"]["step"]["distinct"] == 32
    assert found["steps"]["decode"]["break_even_kept"] == 9
    paths = found["steps"]["prefill"]["paths"]
    assert paths["multi-LoRA"] == paths["composed"] != paths["shared"]
    left = found["kv_tokens"]
    assert left["separate LoRAs"] < 0 < left["poly, tensorpoly-1"]


def test_options_reach_the_steps() -> None:
    line = (
        "--model smollm2-135m-instruct --gpu a10g --tasks 5 --experts 3 --rank 2 --order 4 "
        "--slots 9 --batch 6 --context 7 --reuse 11 --prompts 2 --prompt-tokens 13 --json"
    )
    found = json.loads(run(*line.split()))
    assert found["size"] == {"experts": 3, "rank": 2, "order": 4}
    assert (found["tasks"], found["slots"]) == (5, 5)
    assert found["steps"]["decode"]["step"] == {
        "tokens": 6, "distinct": 5, "sequences": 6, "context": 7, "reuse": 11,
    }  # fmt: skip
    assert found["steps"]["prefill"]["step"] == {
        "tokens": 26, "distinct": 2, "sequences": 2, "context": 0, "reuse": 1,
    }  # fmt: skip
    one_task = json.loads(run(*line.split(), "--distinct", "1"))
    assert {each["step"]["distinct"] for each in one_task["steps"].values()} == {1}


def test_a_model_that_is_too_large_is_told_so() -> None:
    line = run("--model", "llama-3.1-70b", "--gpu", "H100").split("separate LoRAs")[0]
    assert line.count("too large") == 3


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"])
def test_models_answer_to_their_usual_names(name: str) -> None:
    assert model_shape(name) == MODELS["meta-llama/Llama-3.1-8B"]


def test_unknown_names_list_the_known_ones() -> None:
    model = refusal("--model", "llama-3.1-8", "--gpu", "h100")
    assert all(name in model for name in MODELS)
    assert "did you mean meta-llama/Llama-3.1-8B" in model
    gpu = refusal("--model", "llama-3.1-8b", "--gpu", "h10")
    assert all(name in gpu for name in (*GPUS, "cpu"))
    assert "did you mean h100" in gpu


def test_a_folder_gives_its_shape(tmp_path: Path) -> None:
    config = LlamaConfig(**TINY, head_dim=8, tie_word_embeddings=True)
    folder = saved(config, tmp_path)
    expected = ModelShape(3, 64, 96, heads=4, kv_heads=2, head_dim=8, vocabulary=50, tied=True)
    assert model_shape(folder) == expected
    assert model_shape(f"{folder}/config.json") == expected


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (MixtralConfig(**TINY, num_local_experts=2), "not a decoder of equal layers"),
        (OPTConfig(vocab_size=50, hidden_size=48, num_hidden_layers=1, ffn_dim=96), "OPTConfig"),
    ],
    ids=["mixture", "other names"],
)
def test_a_model_of_another_build_is_refused(
    config: PretrainedConfig, why: str, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=why):
        model_shape(saved(config, tmp_path))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="neither"):
        model_shape(str(tmp_path))


def test_given_speeds_stand_in_for_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_limits, "measure_device", lambda: DeviceLimits(5e9, 7e9))
    assert cli_plan.device_limits("cpu", None, None) == DeviceLimits(5e9, 7e9)
    assert cli_plan.device_limits("cpu", 2, None) == DeviceLimits(2e9, 7e9)
    monkeypatch.delattr(device_limits, "measure_device")
    assert cli_plan.device_limits("cpu", 2, 3) == DeviceLimits(2e9, 3e12)
    assert cli_plan.device_limits("h100", 2, 3) == replace(GPUS["h100"], bandwidth=2e9, flops=3e12)
    assert "measured or given" in run("--model", "smollm2-135m", "--gpu", "h100", "--tflops", "3")
