"""TLoRA: one low-rank adapter whose sides are tensor products of leaves."""

from __future__ import annotations

from torch import Tensor

from polyrex.adapters.spec import AdapterSpec

from .protocol import Experts
from .tensorpoly_1 import TensorPoly1Experts


class TLoraExperts(TensorPoly1Experts):
    """TLoRA: `delta = gate * B A x / r`, with A and B the normalised tensor products of leaves.

    One expert, so no routing logits: its leaves are stored as `[N, 1, r, q]`.
    """

    method = "tlora"
    uses = frozenset({"rank", "order", "norm"})
    examples = (AdapterSpec("tlora", rank=3), AdapterSpec("tlora", rank=3, order=4))

    @classmethod
    def routing_size(cls, spec: AdapterSpec) -> int:
        return 0

    @classmethod
    def route(cls, spec: AdapterSpec, logits: Tensor, *, sample: bool = False) -> Tensor:
        return Experts.route(spec, logits)
