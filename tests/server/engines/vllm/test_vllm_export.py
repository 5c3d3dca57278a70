"""Tasks exported as LoRAs give the same log-probabilities in vLLM's own multi-LoRA, without us."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest

from polyrex.adapters.files.inventory import load_experts
from polyrex.adapters.model.base_model import load_base
from polyrex.adapters.peft.lora_checkpoint import export_lora
from polyrex.adapters.spec import AdapterSpec
from support.random_inventory import make_inventory, make_task
from support.small_model import SPECS, VOCABULARY, spec_id

LORAS = {"lora", "poly", "mhr", "tlora", "tensorpoly-1", "tensorpoly-2"}
EXPORTED = [spec for spec in SPECS if spec.method in LORAS or spec.form == "static"]
"""The methods whose tasks are LoRAs; tests/adapters/peft/test_peft.py shows the others refused."""
PROMPT = tuple(number * 37 % VOCABULARY for number in range(1, 31))
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def multi_lora(small_base: str) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "")  # without polyrex
        llm = LLM(
            small_base,
            dtype="float32",
            enforce_eager=True,
            skip_tokenizer_init=True,
            enable_lora=True,
            max_lora_rank=16,
            max_model_len=64,
            kv_cache_memory_bytes=1 << 25,
        )
        yield llm
        llm.llm_engine.engine_core.shutdown()


def said(llm: LLM, lora: LoRARequest | None) -> Tensor:
    """Log-probabilities of the prompt's tokens but the first."""
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    prompt = TokensPrompt(prompt_token_ids=list(PROMPT))
    (output,) = llm.generate(prompt, sampling, lora_request=lora, use_tqdm=False)
    rows: list[Any] = list(output.prompt_logprobs or ())[1:]
    return torch.tensor([row[token].logprob for row, token in zip(rows, PROMPT[1:], strict=True)])


@torch.no_grad()
def expected(model: Any) -> Tensor:
    logits = model(input_ids=torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    return torch.stack([logits[at, token] for at, token in enumerate(PROMPT[1:])])


@pytest.mark.parametrize("spec", EXPORTED, ids=spec_id)
def test_vllm_serves_the_export_as_polyrex_computes_the_task(
    multi_lora: LLM, small_base: str, tmp_path: Path, spec: AdapterSpec
) -> None:
    """The wrong case is another task, or the base model if the method has one adapter for all."""
    inventory = make_inventory(tmp_path / "inventory.safetensors", small_base, spec, spread=0.05)
    task, other = make_task(inventory, 1), make_task(inventory, 2)
    folder = tmp_path / "lora"
    export_lora(inventory, task.router.logits, folder, small_base)
    found = said(multi_lora, LoRARequest(spec_id(spec), 1 + EXPORTED.index(spec), str(folder)))
    adapted = load_experts(inventory, load_base(small_base, torch.float32))
    with adapted.routed(task.router.logits):
        torch.testing.assert_close(found, expected(adapted.model), rtol=0, atol=TOLERANCE)
    with adapted.routed(other.router.logits if inventory.routing_shape[1] else None):
        assert (found - expected(adapted.model)).abs().max() > 10 * TOLERANCE
