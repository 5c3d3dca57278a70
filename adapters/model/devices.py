"""Devices by their names on the command line, and tensors on their way to one."""

from __future__ import annotations

import os
import re

import torch
from torch import Tensor

from polyrex.adapters.errors import DeviceError

_NAME = re.compile(r"auto|cpu|cuda(:\d+)?")


def pick_device(name: str) -> torch.device:
    """The device of a name: `cpu`, `cuda`, `cuda:N`, or `auto`, which is CUDA where there is one.

    Under `torchrun`, `cuda` is the card of the process's own number. Raises DeviceError where this
    machine has no such device, and where several processes would share the one that is named.
    """
    if not _NAME.fullmatch(name):
        raise DeviceError(f"device {name}: expected auto, cpu, cuda or cuda:N")
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not cards):
        return torch.device("cpu")
    _, _, number = name.partition(":")
    card = int(number or os.environ.get("LOCAL_RANK", "0"))
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if number and beside > 1 and cards > 1:
        raise DeviceError(
            f"device {name}: torchrun has started {beside} processes here, "
            "which need a card each; give cuda"
        )
    if card >= cards:
        raise DeviceError(f"device {name}: expected CUDA device {card}, but {_there(cards)}")
    return torch.device("cuda", card)


def device_name(device: torch.device) -> str:
    """What a record calls a device: the card's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. Where that is a card, the host does not wait for the copy."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)  # to the CPU, the host must wait: it could read too early


def _there(cards: int) -> str:
    if cards:
        return f"this machine has {cards}, numbered from 0"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    return f"PyTorch {torch.__version__} finds no card, or no driver for it"
