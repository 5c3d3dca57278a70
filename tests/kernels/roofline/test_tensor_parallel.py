"""The figures of docs/decisions/tensor-parallel.md: what cutting both sides of adapters would save.

Per rank and step, Llama-3.1-70B on eight H100 at rank 16; the roofline's `low_rank`, with each side
cut or whole.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from polyrex.kernels.roofline.model_shapes import MODELS, Projection
from polyrex.kernels.roofline.roofline import (
    BYTES,
    GPUS,
    DeviceLimits,
    Product,
    Step,
    StepCost,
    base_products,
    low_rank,
)

MODEL, RANKS = MODELS["meta-llama/Llama-3.1-70B"], 8
DEVICE = DeviceLimits(GPUS["h100"].bandwidth, GPUS["h100"].flops)  # launches are the same in both
COLUMN = ("qkv", "gate_up")
DECODE = Step(32, 32, sequences=32, context=512)
PREFILL = Step(2048, 32, sequences=4)
WIDTHS = {"shared, 8 experts": (128, 1), "static trex": (16, 1), "multi-LoRA, 32 tasks": (16, 32)}
PAGE = Path(__file__).parents[3] / "docs" / "decisions" / "tensor-parallel.md"


def on_one_rank(projection: Projection, tokens: int, width: int, copies: int) -> list[Product]:
    """The adapters of one layer where the frozen layer is cut, and their other side is whole."""
    d_in, outputs = projection.d_in, projection.outputs
    if projection.name in COLUMN:
        cut = Projection(projection.name, d_in, tuple(d_out // RANKS for d_out in outputs))
    else:
        cut = Projection(projection.name, d_in // RANKS, outputs)
    return low_rank(cut, tokens, width, copies)


def fully_cut(projection: Projection, tokens: int, width: int, copies: int) -> list[Product]:
    """The same with A of column layers cut by rank r, and B of row layers by outputs."""
    d_in, outputs = projection.d_in, projection.outputs
    if projection.name in COLUMN:
        a = low_rank(Projection("", d_in, outputs), tokens, width // RANKS, copies)[0]
        return [a, *on_one_rank(projection, tokens, width, copies)[1:]]
    cut = Projection("", d_in // RANKS, tuple(d_out // RANKS for d_out in outputs))
    return low_rank(cut, tokens, width, copies)


def milliseconds(step: Step, width: int, copies: int) -> tuple[float, float]:
    """A step's adapters, as they are and fully cut."""
    found = []
    for way in (on_one_rank, fully_cut):
        layer = [p for each in MODEL.projections for p in way(each, step.tokens, width, copies)]
        found.append(1e3 * StepCost.of(layer * MODEL.layers, DEVICE).seconds)
    return found[0], found[1]


@pytest.mark.parametrize("name", WIDTHS)
def test_the_page_shows_what_the_roofline_says(name: str) -> None:
    (line,) = (line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} |"))
    shown = [float(cell) for cell in re.findall(r"\| ([0-9.]+) ", line)]
    right = [*milliseconds(DECODE, *WIDTHS[name]), *milliseconds(PREFILL, *WIDTHS[name])]
    assert shown == pytest.approx(right, rel=0.035)  # as rounded


def test_the_base_takes_what_the_page_says() -> None:
    seconds = [StepCost.of(base_products(MODEL, s), DEVICE).seconds for s in (DECODE, PREFILL)]
    assert [1e3 * each / RANKS for each in seconds] == pytest.approx([7.2, 47.7], rel=0.01)


def test_a_collective_would_have_to_be_faster_than_a_launch() -> None:
    collectives = 4 * MODEL.layers
    bounds = {name: (was - cut) / collectives * 1e3 for name, (was, cut) in decode().items()}
    assert list(bounds.values()) == pytest.approx([1.5, 0.34, 5.3], rel=0.03)
    repeated = sum(
        each.d_in * len(each.outputs) if each.name in COLUMN else sum(each.outputs)
        for each in MODEL.projections
    )
    saved = [BYTES * width * repeated * MODEL.layers * (1 - 1 / RANKS) for width in (128, 16)]
    assert [each / 1e9 for each in saved] == pytest.approx([1.0, 0.13], rel=0.03)


def decode() -> dict[str, tuple[float, float]]:
    return {name: milliseconds(DECODE, *sizes) for name, sizes in WIDTHS.items()}
