"""Adapters for vLLM's own multi-LoRA, as PEFT writes them: random, on every projection."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 16
TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""The layers of vLLM's model that carry the seven projections."""


def write_adapters(model: Path, folder: Path, count: int) -> None:
    """`count` folders t0, t1, ... for the Llama in folder `model`, each a rank-16 LoRA."""
    shapes = _shapes(json.loads((model / "config.json").read_text()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
        "base_model_name_or_path": str(model),
    }
    for number in range(count):
        target = folder / f"t{number}"
        target.mkdir(parents=True)
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name, (d_in, d_out) in shapes.items():
            key = f"base_model.model.{name}"
            a = torch.randn(RANK, d_in, generator=generator) * 0.01
            b = torch.randn(d_out, RANK, generator=generator) * 0.01
            tensors[f"{key}.lora_A.weight"] = a.bfloat16()
            tensors[f"{key}.lora_B.weight"] = b.bfloat16()
        save_file(tensors, target / "adapter_model.safetensors")
        (target / "adapter_config.json").write_text(json.dumps(config))


def _shapes(config: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of every projection, by name."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    heads, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    block = {
        "self_attn.q_proj": (hidden, heads),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (heads, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    layers = range(config["num_hidden_layers"])
    return {f"model.layers.{i}.{name}": shape for i in layers for name, shape in block.items()}
