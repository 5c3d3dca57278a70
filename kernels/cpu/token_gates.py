"""Adapters whose tokens choose their gates, in one layer of an engine, on the compiled operator.

`add_by_token_` (arguments: rank_space.py; source: csrc/mixers.h) computes for each token h [I] and,
right after it, G logits; both are shrinks. A token's routing weights are s, then c [G]. With gates
`g = token * s * top_k(softmax(logits)) + task * c`, `y_t += B g^T h` for G = I * J pairs, or
`y_t += B (g_(k mod G) h_k)` if J is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyrex.kernels.modules import LayerModule, TokenGates
from polyrex.kernels.packing import UNWEIGHTED, padded
from polyrex.kernels.routing import StepRouting

from .rank_space import Part, Side


class TokenSpaceLayer:
    """`y_t += B G_t A x_t` for every module of a layer, with gates G_t that the token chooses.

    A module's a is [1, I, d_in], its b [1, J, d_out]; it must hold all of its inputs.
    """

    state_bytes = 0

    def __init__(
        self, modules: Sequence[LayerModule], gates: Sequence[TokenGates], width: int
    ) -> None:
        """`width` is W, the routing weights a row holds for one module."""
        first = gates[0]
        inner, count = modules[0].a.shape[1], len(first.router)
        self._sizes = (
            inner,
            modules[0].b.shape[1] if first.pairs else 0,
            count,
            first.top_k or count,
        )
        each = padded(inner) + padded(count)
        self._hidden = len(modules) * each
        self._scales = torch.tensor([[own.token, own.task] for own in gates])
        shrink, expand = [], []
        for number, (m, own) in enumerate(zip(modules, gates, strict=True)):
            d_in, b = m.a.shape[2], m.b[0][:, m.outputs]
            shrink.append((m.a[0].t(), Part(0, d_in, number * each, UNWEIGHTED)))
            at = Part(0, d_in, number * each + padded(inner), UNWEIGHTED)
            shrink += [(part.t(), at) for part in _parts(own.router, m.a.dtype)]
            expand.append((b, Part(m.column, b.shape[1], number * each, m.index * width)))
        self._a, self._b = Side.of(shrink), Side.of(expand)
        self._add_ = torch.ops.polyrex.add_by_token_.default

    def add_(self, y: Tensor, x: Tensor, step: StepRouting) -> None:
        """Add the adapters' contribution for x [T, d_in] to y [T, d], in place."""
        sides = self._a.values, self._a.parts, self._b.values, self._b.parts
        self._add_(y, x, *sides, self._hidden, *self._sizes, self._scales, step.weights, step.rows)


def _parts(router: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Tensors of `dtype` that add up to the router, so that gates are not chosen in half precision.

    One is enough if `dtype` holds the router exactly, as when the inventory is stored in it.
    """
    high = router.to(dtype)
    low = (router - high).to(dtype)
    return [high, low] if low.any() else [high]
