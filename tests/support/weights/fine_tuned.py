"""A base model of the same configuration with other weights, which must not be taken for it."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def fine_tune(base: str, to: Path) -> str:
    """A copy of a model's folder in which one tensor of its last layer has moved a little."""
    shutil.copytree(base, to)
    tensors = load_file(to / WEIGHTS)
    name = max(name for name in tensors if name.endswith("mlp.down_proj.weight"))
    tensors[name] *= 1.05
    save_file(tensors, to / WEIGHTS, {"format": "pt"})
    return str(to)
