"""Target modules as the layers of an engine hold them, whatever processor runs the layers."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .factored import FactoredSides


@dataclass(frozen=True)
class LayerModule:
    """A target module in a layer: all of it, or the part that tensor parallelism leaves here.

    a [S, E*r, d_in/S] and b [S, E*r, d_out/S] belong to the whole module; `inputs` and `outputs`
    are the parts of d_in and d_out that are here. `column` is where the outputs begin in the
    layer's output, `index` the module's number in the routing table.
    """

    index: int
    a: Tensor
    b: Tensor
    inputs: slice
    outputs: slice
    column: int


@dataclass(frozen=True)
class TokenGates:
    """How a module's tokens choose their gates: by a router [G, d_in] in float32.

    The gates are `token * s * top_k(softmax(router x)) + task * c`, with s and c [G] from the
    task's routing weights. `pairs` gates every pair of an A and a B side; `top_k` is how many gates
    are kept, None for all.
    """

    router: Tensor
    token: float = 1.0
    task: float = 0.0
    pairs: bool = False
    top_k: int | None = None


class TaskState(Protocol):
    """The tensors of D tasks from which an operator computes one module's adapters."""

    @property
    def operator(self) -> str:
        """The name of the operator in torch.ops.polyrex: `(y, x, states, parts, places)`.

        It adds to y in place. `states` [places, size] holds one task's state a row; `parts`, int64
        [M, 3 + sizes], holds for each module where its state begins in a row, where its outputs
        begin, how many outputs there are, and its `sizes`; `places` [T] is the row of each token's
        task, -1 for the base model.
        """

    @property
    def sizes(self) -> tuple[int, ...]:
        """The module's dimensions as the operator takes them."""

    def packed(self, dtype: torch.dtype) -> Tensor:
        """[D, size]: each task's values in the operator's layout."""


S = TypeVar("S", bound=TaskState, covariant=True)


@dataclass(frozen=True)
class TaskStateModule(Generic[S]):
    """A whole target module, and the function that derives its state for D tasks.

    `derive` takes rows of the module's routing weights, [D, W] float32; `column` is where the
    outputs begin in the layer's output.
    """

    index: int
    width: int  # W
    d_out: int
    column: int
    derive: Callable[[Tensor], S]


@dataclass(frozen=True, eq=False)
class LeafModule:
    """A target module in leaf space, on a GPU: all of it, or a part as in `LayerModule`.

    `derive` takes the operands and rows of the module's routing weights, [D, W] float32. Modules of
    one `kind` have the same `derive`, and operands of the same shapes.
    """

    index: int
    width: int  # W
    kind: Hashable
    operands: tuple[Tensor, ...]
    derive: Callable[[tuple[Tensor, ...], Tensor], FactoredSides]
    inputs: slice
    outputs: slice
    column: int


class Hidden(NamedTuple):
    """What the A sides of a layer's n modules make of T tokens: `h = parts.sum(1)`.

    The sum is left to those who read h, which saves a kernel; its order is fixed.
    """

    parts: Tensor  # [n, P, T, r] float32
    weights: Tensor | None  # [n, T, E] float32, the routing weights of the B sides; None: all 1
