"""How `polyrex plan` prints amounts, three digits and a unit, and what has them."""

from __future__ import annotations

from rich import box
from rich.table import Table

from polyrex.kernels.roofline.roofline import EFFICIENCY, GPUS, MEASURED, DeviceLimits


def in_bytes(number: float) -> str:
    """83886080 -> 83.9 MB."""
    return f"{amount(number)}B"


def amount(number: float) -> str:
    """Three digits and a unit: 83886080 -> 83.9 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{digits(number / size)} {unit}"
    return f"{digits(number)} "


def digits(number: float) -> str:
    """Three digits, or all before the point where there are more."""
    return f"{number:,.0f}" if number >= 999.5 else f"{number:.3g}"


def table(first: str, *columns: str) -> Table:
    """An empty table whose first column holds names, and the others amounts."""
    made = Table(first, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    return made


def device_line(name: str, device: DeviceLimits) -> str:
    """What a device reaches, and where that comes from."""
    memory = "" if device.memory is None else f", {in_bytes(device.memory)}"
    of_sheet = name not in MEASURED and device == GPUS.get(name)
    source = (
        f"{EFFICIENCY} of the data sheet's speeds" if of_sheet else "speeds as measured or given"
    )
    speeds = f"{in_bytes(device.bandwidth)}/s, {amount(device.flops)}FLOP/s"
    return f"{name}: {speeds}{memory} ({source})"
