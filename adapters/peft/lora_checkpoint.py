"""LoRA checkpoints as PEFT writes them: a folder with adapter_config.json and safetensors.

vLLM reads the same files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from polyrex.adapters.errors import FileError, MalformedFile, SpecError, TensorMismatch
from polyrex.adapters.files.inventory import Inventory, read_experts
from polyrex.adapters.files.tensor_file import cast_finite, write_atomic
from polyrex.adapters.methods.composed import LowRank
from polyrex.adapters.methods.registry import method_class

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SIDE = re.compile(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")


@dataclass(frozen=True)
class PeftLora:
    """One LoRA: every module's sides as one task's LowRank, with every scale in b."""

    name: str
    modules: Mapping[str, LowRank]


def export_lora(inventory: Inventory, logits: Tensor, folder: Path, base: str) -> None:
    """Write one task's adapter as a LoRA that PEFT and vLLM load: exactly what polyrex computes.

    logits [groups, R] are the task's router; `base` is what the config says of the base model.
    Raises SpecError where the method is no LoRA a task, and why.
    """
    method = method_class(inventory.spec.method)
    if method.no_lora is not None:
        raise SpecError(f"{method.method}: {method.no_lora}")
    weights = inventory.route(logits).unsqueeze(0)  # [1, M, W]
    modules = {}
    for index, experts in enumerate(read_experts(inventory)):
        with torch.no_grad():
            operands = experts.operands(torch.float32)
            composed = experts.compose(operands, weights[:, index], torch.float32)
        assert isinstance(composed, LowRank), "a method that exports composes two low-rank sides"
        modules[experts.target.name] = composed
    write_lora(folder, modules, base)


def write_lora(folder: Path, modules: Mapping[str, LowRank], base: str) -> None:
    """Write one task's sides, [1, r, d_in] and [1, r, d_out] of every module, in float32.

    `lora_alpha` equals `r`: the scale is in B. Modules are named in full, as PEFT would else take
    every module whose name ends alike.
    """
    rank = len(next(iter(modules.values())).a[0])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(modules),
    }
    tensors = {}
    for name, sides in modules.items():
        for letter, side in (("A", sides.a[0]), ("B", sides.b[0].T)):
            key = f"{_PREFIX}{name}.lora_{letter}.weight"
            tensors[key] = cast_finite(side, torch.float32, f"{folder}: {key}").contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / WEIGHTS, save(tensors, {"format": "pt"}))
    write_atomic(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def read_lora(folder: Path) -> PeftLora:
    """Read a LoRA checkpoint; ranks and scales may differ from module to module.

    Raises FileError where a file cannot be read, MalformedFile where it is no plain LoRA (DoRA,
    trained biases or whole modules, embeddings), TensorMismatch where a side is missing or of a
    shape that does not fit the other.
    """
    config = read_config(folder, "LORA")
    for key, plain in (("bias", "none"), ("use_dora", False), ("fan_in_fan_out", False)):
        if config.get(key, plain) != plain:
            raise MalformedFile(f"{folder / CONFIG}: {key} {config[key]!r} is not supported")
    if config.get("modules_to_save"):
        raise MalformedFile(f"{folder / CONFIG}: modules_to_save are whole modules, not a LoRA")
    modules = {}
    for name, pair in read_parts(folder, _SIDE).items():
        if len(pair) != 2 or len(pair["A"]) != pair["B"].shape[1]:
            shapes = {letter: list(side.shape) for letter, side in pair.items()}
            raise TensorMismatch(f"{folder / WEIGHTS}: {name}: sides that do not fit: {shapes}")
        scale = _scale(config, name, len(pair["A"]))
        modules[name] = LowRank(pair["A"].unsqueeze(0), scale * pair["B"].T.unsqueeze(0))
    if not modules:
        raise MalformedFile(f"{folder / WEIGHTS}: holds no LoRA")
    return PeftLora(folder.name, modules)


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA; patterns name single modules."""
    alpha = float(config.get("lora_alpha", rank))
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = float(own)
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def read_config(folder: Path, kind: str) -> dict[str, Any]:
    """A checkpoint's config; raises FileError, or MalformedFile where it is of another kind."""
    path = folder / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        found = config.get("peft_type")
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError) as error:
        raise MalformedFile(f"{path}: not a readable config: {error}") from error
    if found != kind:
        raise MalformedFile(f"{path}: expected peft_type {kind}, got {found!r:.80}")
    return config


def read_parts(folder: Path, pattern: re.Pattern[str]) -> dict[str, dict[str, Tensor]]:
    """A checkpoint's tensors in float32, by module and part, the groups of `pattern`.

    Raises MalformedFile where a tensor's name does not match, TensorMismatch where one is not
    finite.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _read_tensors(folder).items():
        match = pattern.fullmatch(key)
        if match is None:
            raise MalformedFile(f"{folder / WEIGHTS}: tensor {key:.200} is no part of an adapter")
        found = cast_finite(tensor, torch.float32, f"{folder / WEIGHTS}: tensor {key}")
        parts.setdefault(match[1], {})[match[2]] = found
    return parts


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """From safetensors alone: a pickle could run anything."""
    path = folder / WEIGHTS
    if not path.exists():
        raise FileError(f"{path}: not there (checkpoints in .bin are pickles, and not read)")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise MalformedFile(f"{path}: no complete safetensors file: {error}") from error
