"""The requests, adapters and layer shapes that benchmarks measure."""

from __future__ import annotations

from collections import Counter

from polyrex.adapters.spec import AdapterSpec
from polyrex.kernels.roofline.model_shapes import MODELS

REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 32, 17, 32
PROMPT = "The capital of France is a very nice city and I would like to visit it because"

RANK, EXPERTS = 16, 8
MAIN = {
    "tensorpoly-1": AdapterSpec("tensorpoly-1", rank=RANK, experts=EXPERTS),
    "tensorpoly-2": AdapterSpec("tensorpoly-2", rank=RANK, experts=EXPERTS),
    "trex-static": AdapterSpec("trex", rank=RANK, form="static"),
}
"""The methods that are compared with everything else."""
OTHERS = {
    "lora": AdapterSpec("lora", rank=RANK),
    "tlora": AdapterSpec("tlora", rank=RANK),
    "poly": AdapterSpec("poly", rank=RANK, experts=EXPERTS),
    "mhr": AdapterSpec("mhr", rank=RANK, experts=EXPERTS, splits=4),
    "tensorpoly-x": AdapterSpec("tensorpoly-x", rank=RANK, experts=4),
    "trex-mix": AdapterSpec("trex", rank=8),
    "trex-diagonal": AdapterSpec("trex", rank=RANK, form="diagonal"),
    "molora": AdapterSpec("molora", rank=4, experts=EXPERTS),
    "sira": AdapterSpec("sira", rank=4, experts=EXPERTS),
}
"""The methods that are compared with the base model alone."""

Shapes = dict[str, tuple[int, int, int]]
"""By name: d_in, d_out, and how many of a block's seven projections have them."""


def block_shapes(model: str) -> Shapes:
    """The shapes of the projections of one transformer block."""
    counts = Counter(MODELS[model].modules[:7])
    names = ("q, o", "k, v", "gate, up", "down")
    return {
        name: (*shape, count) for name, (shape, count) in zip(names, counts.items(), strict=True)
    }


SHAPES_135M = block_shapes("HuggingFaceTB/SmolLM2-135M")
SHAPES_8B = block_shapes("meta-llama/Llama-3.1-8B")
TOKENS = (1, 8, 32, 256, 2048)
