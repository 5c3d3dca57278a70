"""Loading a base model to train adapters on."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from polyrex.adapters.errors import FileError
from polyrex.adapters.model.base_model import (
    Quantisation,
    load_base,
    load_tokenizer,
    resolve_base,
    torch_dtype,
)

CPU = torch.device("cpu")


def load_for_training(
    name: str, dtype: str, device: torch.device = CPU, quantize: Quantisation | None = None
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A frozen base model on a device, by its name or folder, and its tokenizer.

    Raises FileError if the default model's package is missing, or the tokenizer has no token that
    ends an answer; SpecError if the dtype is unknown, DeviceError if the model cannot be quantised
    on the device.
    """
    path = resolve_base(name)
    tokenizer = load_tokenizer(path)
    if tokenizer.eos_token_id is None:
        raise FileError(
            f"base model {path}: its tokenizer names no eos_token, and without one no answer ends"
        )
    base = load_base(path, torch_dtype(dtype), device, quantize)
    if device.type == "cpu":
        use_eager_attention(base)
    return base, tokenizer


def use_eager_attention(base: nn.Module) -> None:
    """Compute attention as plain products: on short rows, the CPU's fused kernel has a slow
    backward pass."""
    if isinstance(base, PreTrainedModel):
        base.set_attn_implementation("eager")
