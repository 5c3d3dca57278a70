"""Random LoRAs for vLLM's own multi-LoRA, in the files that PEFT writes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.cases import RANK
from polyrex.adapters.model.attach import find_targets
from polyrex.adapters.model.base_model import load_base
from polyrex.adapters.peft.lora import CONFIG, WEIGHTS


def write_loras(model: str, folder: Path, count: int) -> None:
    """Write a LoRA for every projection of `model`, in bfloat16, to each of t0, t1, ... ."""
    targets = find_targets(load_base(model, torch.bfloat16))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "bias": "none",
        "target_modules": sorted({target.name.rpartition(".")[2] for target in targets}),
        "base_model_name_or_path": model,
    }
    for number in range(count):
        lora, tensors = folder / f"t{number}", {}
        generator = torch.Generator().manual_seed(number)
        for target in targets:
            for side, shape in ("A", (RANK, target.d_in)), ("B", (target.d_out, RANK)):
                drawn = 0.01 * torch.randn(shape, generator=generator)
                tensors[f"base_model.model.{target.name}.lora_{side}.weight"] = drawn.bfloat16()
        lora.mkdir(parents=True)
        save_file(tensors, lora / WEIGHTS)
        (lora / CONFIG).write_text(json.dumps(config))
