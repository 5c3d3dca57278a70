"""A small random Llama with an inventory of every method, for the tests of the vLLM engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from polyrex.adapters.methods.registry import METHODS
from polyrex.adapters.spec import AdapterSpec

VOCABULARY = 500

SPECS = tuple(
    # 3 splits do not divide the model's dimensions.
    replace(spec, splits=2, rank=3) if spec.splits > 1 else spec
    for method in METHODS.values()
    for spec in method.examples
    if spec.order == AdapterSpec.order
)
"""Every method and form, of one order."""


def spec_id(spec: AdapterSpec) -> str:
    return f"trex-{spec.form}" if spec.method == "trex" else spec.method


def random_llama(
    hidden_size: int = 24, intermediate_size: int = 30, vocab_size: int = 50, **fields: Any
) -> nn.Module:
    """A random Llama of two layers in evaluation mode, the same every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,  # two ranks can share them
        num_key_value_heads=2,
        vocab_size=vocab_size,
        **fields,
    )
    model: nn.Module = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    return model.eval()


def write_small_model(folder: Path) -> None:
    """A small model, with weights so large that no two tokens are a close call."""
    model = random_llama(128, 256, VOCABULARY, max_position_embeddings=512, initializer_range=0.2)
    model.save_pretrained(folder)  # type: ignore[operator]
