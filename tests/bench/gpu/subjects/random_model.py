"""A random Llama of a known shape, made on its device, and adapters for it."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from polyrex.adapters.model.attach import AdaptedModel, attach, find_targets
from polyrex.adapters.model.routed_linear import RoutedLinear
from polyrex.adapters.spec import AdapterSpec
from polyrex.kernels.roofline.model_shapes import MODELS, ModelShape

SHAPE_8B = MODELS["meta-llama/Llama-3.1-8B"]
TINY = ModelShape(2, 32, 48, 4, 2, 8, 500, False)
"""What a dry run has in its place."""


def random_llama(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A frozen model of a shape, for contexts of 4,096 tokens; host memory holds no copy of it."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=shape.tied,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: nn.Module = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def attach_random(model: nn.Module, spec: AdapterSpec) -> AdaptedModel:
    """Random adapters on every projection, so far from 0 that they change what is generated."""
    adapted = attach(model, spec, find_targets(model))
    with torch.no_grad():
        for layer in adapted.layers:
            parameters = dict(layer.experts.named_parameters())
            if "gate" in parameters:
                parameters["gate"].fill_(0.3)
            else:
                parameters["lora_b"].normal_(0, 0.3)
    return adapted


def detach(adapted: AdaptedModel) -> None:
    """Take the adapters out of their model again."""
    for name, module in list(adapted.model.named_modules()):
        if isinstance(module, RoutedLinear):
            parent, _, attribute = name.rpartition(".")
            setattr(adapted.model.get_submodule(parent), attribute, module.base)
