"""Loading a base model to train adapters on."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from polyrex.adapters.model.base_model import load_base, load_tokenizer, resolve_base, torch_dtype


def load_for_training(name: str, dtype: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A frozen base model, by its name or folder, and its tokenizer.

    Raises FileError if the default model's package is missing, SpecError if the dtype is unknown.
    """
    path = resolve_base(name)
    base = load_base(path, torch_dtype(dtype))
    use_eager_attention(base)
    return base, load_tokenizer(path)


def use_eager_attention(base: nn.Module) -> None:
    """Compute attention as plain products: on short rows, the CPU's fused kernel has a slow
    backward pass."""
    if isinstance(base, PreTrainedModel):
        base.set_attn_implementation("eager")
