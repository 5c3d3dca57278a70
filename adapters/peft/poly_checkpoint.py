"""PEFT's `poly` checkpoints (Poly, and MHR where there are splits), taken over exactly."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from polyrex.adapters.errors import MalformedFile, TensorMismatch
from polyrex.adapters.model.attach import AdaptedModel, attach
from polyrex.adapters.spec import AdapterSpec, TargetModule

from .lora_checkpoint import CONFIG, WEIGHTS, read_config, read_parts

_TENSOR = re.compile(
    r"base_model\.model\.(.+)\.(poly_lora_A|poly_lora_B|poly_router\.module_logits)"
)


@dataclass(frozen=True)
class ImportedPoly:
    """The adapted model, and the logits [tasks, groups, R] of the routers of all its tasks."""

    adapted: AdaptedModel
    logits: Tensor


def import_poly(folder: Path, model: nn.Module) -> ImportedPoly:
    """Attach a PEFT `poly` checkpoint to the base model that it was trained on.

    PEFT's formula is ours: `A_t = sum_e w_te A_e` on S splits, weights `sigmoid(Z) / sum`, and the
    delta divided by r. Raises FileError where a file cannot be read, MalformedFile where it is no
    poly checkpoint, TensorMismatch where a tensor does not fit the config, SpecError where a module
    is not in the model.
    """
    config = read_config(folder, "POLY")
    if config.get("modules_to_save"):
        raise MalformedFile(f"{folder / CONFIG}: modules_to_save are whole modules, not adapters")
    rank, experts, splits = (int(config[key]) for key in ("r", "n_skills", "n_splits"))
    parts = read_parts(folder, _TENSOR)
    order = [name for name, _ in model.named_modules() if name in parts]
    order += sorted(parts.keys() - set(order))  # attach says which one is missing
    targets = []
    for name in order:
        a, b = (parts[name].get(f"poly_lora_{side}") for side in "AB")
        if a is None or b is None or a.dim() != 4 or b.dim() != 4:
            raise TensorMismatch(f"{folder / WEIGHTS}: {name}: a side is missing, or misshapen")
        targets.append(TargetModule(name, splits * a.shape[2], splits * b.shape[3]))
    if splits == 1:
        spec = AdapterSpec("poly", rank=rank, experts=experts)
    else:
        spec = AdapterSpec("mhr", rank=rank, experts=experts, splits=splits)
    adapted = attach(model, spec, tuple(targets))
    rows = []
    for name, layer in zip(order, adapted.layers, strict=True):
        own = parts[name]
        routing = own.get("poly_router.module_logits", torch.empty(0))
        expected = {
            "poly_lora_A": layer.experts.get_parameter("lora_a").shape,
            "poly_lora_B": layer.experts.get_parameter("lora_b").shape,
            "poly_router.module_logits": torch.Size((int(config["n_tasks"]), splits * experts)),
        }
        for key, shape in expected.items():
            if key not in own or own[key].shape != shape:
                got = list(own[key].shape) if key in own else "nothing"
                raise TensorMismatch(
                    f"{folder / WEIGHTS}: {name}.{key} must have shape {list(shape)}, got {got}"
                )
        with torch.no_grad():
            layer.experts.get_parameter("lora_a").copy_(own["poly_lora_A"])
            layer.experts.get_parameter("lora_b").copy_(own["poly_lora_B"])
        rows.append(routing)
    return ImportedPoly(adapted, torch.stack(rows, 1))
