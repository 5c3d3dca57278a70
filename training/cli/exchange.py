"""The commands `polyrex export`, `import-poly` and `compress`: adapters in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, PositiveInt

from polyrex.adapters.errors import FileError
from polyrex.adapters.files.inventory import read_inventory
from polyrex.adapters.files.router import read_router
from polyrex.adapters.model.base_model import DEFAULT_BASE, weights_of
from polyrex.adapters.peft.lora_checkpoint import export_lora
from polyrex.training.exchange.lora_folder import compress_loras, describe
from polyrex.training.exchange.poly import import_poly_checkpoint

from .train import Base, Device, Dtype, Inventory, log_to_terminal

Out = Annotated[Path, Parameter(help="Folder for the result.")]


def export(
    *,
    inventory: Inventory,
    router: Annotated[Path, Parameter(help="The router's file of the task.")],
    out: Out,
    base: Annotated[str, Parameter(help="The base model that the export names.")] = DEFAULT_BASE,
) -> None:
    """Write a task's adapter as a LoRA that PEFT and vLLM load."""
    log_to_terminal()
    read = read_inventory(inventory)
    read.base.check_weights(weights_of(base), str(inventory))
    try:
        data = router.read_bytes()
    except OSError as error:
        raise FileError(f"{router}: cannot be read: {error.strerror}") from error
    export_lora(read, read_router(data, str(router), read).logits, out, base)
    print(f"wrote {out}")


def import_poly(
    checkpoint: Annotated[Path, Parameter(help="Folder of a PEFT poly checkpoint.")],
    *,
    out: Out,
    base: Base = DEFAULT_BASE,
) -> None:
    """Convert a PEFT poly checkpoint to an inventory, and a router for each of its tasks."""
    log_to_terminal()
    print(f"wrote {import_poly_checkpoint(checkpoint, out, base)}")


def compress(
    loras: Annotated[Path, Parameter(help="Folder of folders, a PEFT LoRA in each.")],
    *,
    out: Out,
    base: Base = DEFAULT_BASE,
    rank: Annotated[PositiveInt | None, Parameter(help="Rank of the shared bases.")] = None,
    error: Annotated[
        NonNegativeFloat | None,
        Parameter(help="Instead of a rank: the largest relative error of any task."),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Compress many LoRAs to shared bases and a small core for each task, ready to be served."""
    log_to_terminal()
    report = compress_loras(loras, out, base, rank=rank, error=error, dtype=dtype, device=device)
    print(describe(report))
