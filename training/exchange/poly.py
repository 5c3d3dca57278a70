"""PEFT `poly` checkpoints as inventories."""

from __future__ import annotations

from pathlib import Path

import torch

from polyrex.adapters.files.bundle import NewRouter, write_bundle
from polyrex.adapters.model.base_model import load_base, resolve_base
from polyrex.adapters.peft.poly_checkpoint import import_poly


def import_poly_checkpoint(checkpoint: Path, out: Path, base: str) -> Path:
    """Write a PEFT `poly` checkpoint to `out`, as an inventory with a router for each of its tasks.

    The conversion is exact: every task has the logits that PEFT computes. Tasks are named `task-0`,
    `task-1` and so on, by PEFT's numbers. Returns `out`.
    """
    model = load_base(resolve_base(base), torch.float32)
    imported = import_poly(checkpoint, model)
    origin = {"imported": f"PEFT poly, {checkpoint.name}"}
    routers = {
        f"task-{i}": NewRouter(logits, provenance=origin)
        for i, logits in enumerate(imported.logits)
    }
    write_bundle(out, imported.adapted, routers)
    return out
