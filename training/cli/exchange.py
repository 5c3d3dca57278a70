"""The commands `polyrex export`, `import-poly` and `compress`: adapters in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polyrex.adapters.errors import FileError
from polyrex.adapters.files.inventory import read_inventory
from polyrex.adapters.files.router import read_router
from polyrex.adapters.model.base_model import DEFAULT_BASE
from polyrex.adapters.peft.lora import export_lora
from polyrex.training.exchange.exchange import compress_loras, describe, import_poly_checkpoint

from .train import Base, Inventory, clear_errors

Out = Annotated[Path, typer.Option(help="Folder for the result.")]


def export(
    inventory: Inventory,
    router: Annotated[Path, typer.Option(help="The router's file of the task.")],
    out: Out,
    base: Annotated[str, typer.Option(help="What the export says of its base model.")] = (
        DEFAULT_BASE
    ),
) -> None:
    """Write a task's adapter as a LoRA that PEFT and vLLM load."""
    with clear_errors():
        read = read_inventory(inventory)
        try:
            data = router.read_bytes()
        except OSError as error:
            raise FileError(f"{router}: cannot be read: {error.strerror}") from error
        export_lora(read, read_router(data, str(router), read).logits, out, base)
        typer.echo(f"wrote {out}")


def import_poly(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a PEFT poly checkpoint.")],
    out: Out,
    base: Base = DEFAULT_BASE,
) -> None:
    """Take over a PEFT poly checkpoint: an inventory, and a router for each of its tasks."""
    with clear_errors():
        typer.echo(f"wrote {import_poly_checkpoint(checkpoint, out, base)}")


def compress(
    loras: Annotated[Path, typer.Argument(help="Folder of folders, a PEFT LoRA in each.")],
    out: Out,
    base: Base = DEFAULT_BASE,
    rank: Annotated[int | None, typer.Option(help="Rank of the shared bases.", min=1)] = None,
    error: Annotated[
        float | None, typer.Option(help="Instead: the most relative error of any task.", min=0)
    ] = None,
) -> None:
    """Compress many LoRAs to shared bases and a small core a task, ready to be served."""
    with clear_errors():
        typer.echo(describe(compress_loras(loras, out, base, rank=rank, error=error)))
