"""Where a second copy of a base model may lie, beside an engine that runs the first."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from polyrex.adapters.errors import DeviceError
from polyrex.adapters.model.base_model import resolve_base
from polyrex.adapters.model.devices import pick_device

OVERHEAD = 2 << 30
"""Bytes that fitting takes on a card beside weights: activations of 8 rows, and CUDA itself."""

RESERVE = 4 << 30
"""Bytes of a card that are left to the engine, whose own memory may still grow."""


def device_beside(name: str, base: str, dtype: torch.dtype) -> torch.device:
    """The device of a name, for a base model that must not take memory from an engine there.

    A card serves where the model, OVERHEAD and RESERVE fit into what is free of it; this process
    cannot allocate more than that. Where they do not fit, `auto` is the CPU.

    Raises DeviceError where the device is not there, or was named and has no room.
    """
    device = pick_device(name)
    if device.type != "cuda":
        return device
    free, total = _memory(device)
    wanted = weight_bytes(base, dtype) + OVERHEAD
    if wanted + RESERVE <= free:
        torch.cuda.set_per_process_memory_fraction((free - RESERVE) / total, device)
        return device
    if name == "auto":
        return torch.device("cpu")
    raise DeviceError(
        f"device {name}: fitting takes {wanted / 1e9:.1f} GB and leaves {RESERVE / 1e9:.1f} GB to "
        f"the engine, but {free / 1e9:.1f} GB are free"
    )


def weight_bytes(base: str, dtype: torch.dtype) -> int:
    """The bytes of a base model's weights in `dtype`, from its config alone."""
    config = AutoConfig.from_pretrained(resolve_base(base), trust_remote_code=False)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False
        )
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def _memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of a card; nothing is free where it cannot even be asked."""
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:
        return 0, 1
    return free, total
