"""T5, the encoder-decoder of the papers' T0, trains by the same loop; target modules by pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration

from polyrex.adapters.files.inventory import load_experts, read_inventory, write_inventory
from polyrex.adapters.methods.protocol import LearningRates
from polyrex.adapters.model.attach import AdaptedModel, attach, find_targets
from polyrex.adapters.model.base_model import load_base
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.data.batches import Example
from polyrex.training.loop.run import LoopConfig, run
from polyrex.training.model.multi_task import MultiTaskModel

EVERYTHING = r".*\.(q|k|v|o|wi_0|wi_1|wo)"
SPECS = [
    AdapterSpec("lora", rank=3),
    AdapterSpec("tensorpoly-1", rank=3, experts=4),
    AdapterSpec("trex", rank=3, form="diagonal"),
]
LOOP = LoopConfig(steps=30, batch_rows=4, rates=LearningRates(experts=2e-2, gates=2e-2), warmup=2)


@pytest.fixture(scope="module")
def t5(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random T5 of two and two layers."""
    folder: Path = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.decoder_start_token_id = 0
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def adapted_t5(folder: Path, spec: AdapterSpec) -> AdaptedModel:
    model = load_base(str(folder), torch.float32)
    return attach(model, spec, find_targets(model, EVERYTHING))


def test_pattern_finds_both_stacks_and_the_attention_between_them(t5: Path) -> None:
    names = [target.name for target in adapted_t5(t5, SPECS[0]).targets]
    assert len(names) == 2 * 7 + 2 * 11
    assert "decoder.block.1.layer.1.EncDecAttention.k" in names


def test_loss_is_that_of_the_model_itself(t5: Path, examples: list[Example]) -> None:
    """A mean over rows of the mean over an answer's tokens, row by row, without any padding."""
    model = MultiTaskModel(adapted_t5(t5, SPECS[1]), 2, seed=0)
    found = model.loss(model.collate(examples[:5], 0))
    base: Any = model.adapted.model
    losses = []
    for example in examples[:5]:
        answer = torch.tensor([example.answer])
        logits = base(input_ids=torch.tensor([example.prompt]), labels=answer).logits
        losses.append(F.cross_entropy(logits[0], answer[0]))
    torch.testing.assert_close(found, torch.stack(losses).mean())


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.method)
def test_adapters_learn_and_survive_the_file(
    t5: Path, examples: list[Example], spec: AdapterSpec, tmp_path: Path
) -> None:
    model = MultiTaskModel(adapted_t5(t5, spec), 2, seed=0)
    curve = run(model, model.parameter_groups(), examples, LOOP, pad=0)
    losses = [record.loss for record in curve]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    write_inventory(tmp_path / "i.safetensors", model.adapted)
    base = load_base(str(t5), torch.float32)
    again = MultiTaskModel(
        load_experts(read_inventory(tmp_path / "i.safetensors"), base), 2, seed=0
    )
    again.logits.data.copy_(model.logits)
    batch = model.collate(examples[:5], 0)
    torch.testing.assert_close(again.loss(batch), model.loss(batch))
