"""The factored contraction on a GPU: sides of tasks' adapters that exist only as leaves.

Row k of a side is `first_k (x) second_k - shift`, cut to the dimension. If the d numbers of an
input are laid out as a grid X of p x p', padded with zeros, then `A x` is a product of X with p'
numbers for each row of A, and a weighted sum with p: about sqrt(d) numbers are read for each row,
of which the materialised side has d.

A program takes one token and some rows of its grid, which are the rows of a matrix instruction, so
that tokens need neither share leaves nor be sorted by task. Leaves are read with plain loads, never
with cp.async, which bypasses L1: if tokens share leaves, the next program finds them there.

States are laid out by `polyrex.kernels.leaf_states`. The slow twins are materialised products, in
the tests. Like rank_space.py, this is forward only, and names in kernels follow the same rules.
"""

# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyrex.kernels.leaf_states import ALIGNED, StateSide
from polyrex.kernels.modules import Hidden

from .rank_space import Tile, laid_out

PROGRAMS = 32
"""Programs from which on each takes whole blocks of the grid's rows."""
PADDING = tl.constexpr(ALIGNED)


@triton.jit
def side_of_task(
    states: tl.tensor,
    places: tl.tensor,
    i_t: tl.tensor,
    size: tl.tensor,
    offset: tl.tensor,
    LEAVES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A token's side: pointers to first and to second, of `LEAVES` numbers, and the shift."""
    p_side = states + tl.load(places + i_t) * size + offset
    b_shift = tl.load(p_side).to(tl.float32) + tl.load(p_side + 1).to(tl.float32)
    p_first = p_side + PADDING
    return p_first, p_first + tl.cdiv(LEAVES, PADDING) * PADDING, b_shift


@triton.jit
def factored_shrink_kernel(
    x: tl.tensor,
    states: tl.tensor,
    places: tl.tensor,
    offsets: tl.tuple,
    parts: tl.tensor,
    tokens: tl.tensor,
    begin: tl.tensor,
    d_in: tl.tensor,
    stride_x: tl.tensor,
    size: tl.tensor,
    MODULES: tl.constexpr,
    RANK: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """parts[n, i, t, k] = first_nk^T X_t second_nk - shift_n sum(X_t), over rows u of X_t.

    x holds the `d_in` numbers of X from number `begin` on. Grid: tokens; blocks i of the grid's
    rows; modules x blocks of ranks.
    """
    rank_blocks = tl.cdiv(RANK, BLOCK_R)
    i_t, i_u = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_n, i_r = tl.program_id(2) // rank_blocks, tl.program_id(2) % rank_blocks
    offset = offsets[0]
    for n in tl.static_range(1, MODULES):
        offset = tl.where(i_n == n, offsets[n], offset)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_u = begin // SECOND + i_u * BLOCK_U + tl.arange(0, BLOCK_U)
    o_v = tl.arange(0, BLOCK_V)[None, :]
    o_x = o_u[:, None] * SECOND + o_v - begin
    m_r, m_v, m_u = o_r < RANK, o_v < SECOND, o_u < FIRST
    m_x = m_v & (o_x >= 0) & (o_x < d_in)
    p_h = parts + ((i_n * tl.num_programs(1) + i_u) * tokens + i_t) * RANK + o_r
    if tl.load(places + i_t) < 0:  # the base model
        tl.store(p_h, tl.zeros((BLOCK_R,), tl.float32), mask=m_r)
    else:
        b_x = tl.load(x + i_t * stride_x + o_x, mask=m_x, other=0.0)
        p_first, p_second, b_shift = side_of_task(states, places, i_t, size, offset, RANK * FIRST)
        p_second += o_r[:, None] * SECOND + o_v
        b_second = tl.load(p_second, mask=m_r[:, None] & m_v, other=0.0)
        p_first += o_r[None, :] * FIRST + o_u[:, None]
        b_first = tl.load(p_first, mask=m_r[None, :] & m_u[:, None], other=0.0)
        b_grid = tl.dot(b_x, tl.trans(b_second), input_precision=PRECISION)
        b_h = tl.sum(b_grid * b_first.to(tl.float32), 0)
        b_h -= b_shift * tl.sum(tl.sum(b_x.to(tl.float32), 1), 0)
        tl.store(p_h, b_h, mask=m_r)


@triton.jit
def add_rows(
    p_y: tl.tensor,
    p_h: tl.tensor,
    states: tl.tensor,
    places: tl.tensor,
    i_t: tl.tensor,
    i_u: tl.tensor,
    offset: tl.tensor,
    stride_p: tl.tensor,
    begin: tl.tensor,
    d_out: tl.tensor,
    size: tl.tensor,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Y += sum_k h_k (first_k second_k^T - shift), over a block of rows u of a token's grid Y."""
    o_u = begin // SECOND + i_u * BLOCK_U + tl.arange(0, BLOCK_U)
    o_v = tl.arange(0, BLOCK_V)[None, :]
    o_y = o_u[:, None] * SECOND + o_v - begin
    m_v, m_u = o_v < SECOND, o_u < FIRST
    m_y = m_v & (o_y >= 0) & (o_y < d_out)
    b_y = tl.load(p_y + o_y, mask=m_y, other=0.0)
    p_first, p_second, b_shift = side_of_task(states, places, i_t, size, offset, RANK * FIRST)
    o_p = tl.arange(0, BLOCK_P)[:, None]
    b_out = tl.zeros((BLOCK_U, BLOCK_V), tl.float32)
    b_level = 0.0
    for i_r in range(0, RANK, BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R)
        m_r = o_r < RANK
        m_h = (o_p < PARTS) & m_r[None, :]
        b_h = tl.sum(tl.load(p_h + o_p * stride_p + o_r[None, :], mask=m_h, other=0.0), 0)
        p_u = p_first + o_r[None, :] * FIRST + o_u[:, None]
        b_first = tl.load(p_u, mask=m_r[None, :] & m_u[:, None], other=0.0)
        p_v = p_second + o_r[:, None] * SECOND + o_v
        b_second = tl.load(p_v, mask=m_r[:, None] & m_v, other=0.0)
        b_left = (b_first.to(tl.float32) * b_h[None, :]).to(b_second.dtype)
        b_out = tl.dot(b_left, b_second, b_out, input_precision=PRECISION)
        b_level += tl.sum(b_h, 0)
    b_out += b_y.to(tl.float32) - b_level * b_shift
    tl.store(p_y + o_y, b_out.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit
def factored_expand_kernel(
    y: tl.tensor,
    parts: tl.tensor,
    states: tl.tensor,
    places: tl.tensor,
    offsets: tl.tuple,
    columns: tl.tuple,
    begins: tl.tuple,
    widths: tl.tuple,
    tokens: tl.tensor,
    stride_y: tl.tensor,
    size: tl.tensor,
    MODULES: tl.constexpr,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Y_t += sum_k h_tk (first_nk second_nk^T - shift_n) in the grid Y_t of each module n.

    The outputs of module n here are the `widths[n]` numbers of Y_t from number `begins[n]` on, and
    begin at column `columns[n]` of y. FIRST, SECOND, BLOCK_U and BLOCK_V hold a number for each
    module. Grid: tokens; blocks of the grid's rows; modules.
    """
    i_t, i_u, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    if tl.load(places + i_t) >= 0:
        for n in tl.static_range(MODULES):
            if i_n == n:  # each in code of its own, for constants of its own
                p_y = y + i_t * stride_y + columns[n]
                p_h = parts + (n * PARTS * tokens + i_t) * RANK
                add_rows(
                    p_y, p_h, states, places, i_t, i_u, offsets[n], tokens * RANK, begins[n],
                    widths[n], size, PARTS, RANK, FIRST[n], SECOND[n], BLOCK_P, BLOCK_R,
                    BLOCK_U[n], BLOCK_V[n], PRECISION,
                )  # fmt: skip


@dataclass(frozen=True)
class LeafSide:
    """A side of a module in tasks' states, and the part of its dimension that is here."""

    offset: int  # in a row of the states
    rank: int
    first: int  # p
    second: int  # p'
    begin: int  # of the part, among the side's d numbers
    width: int

    @classmethod
    def of(cls, side: StateSide, part: slice) -> LeafSide:
        """The side of which `part` is here."""
        return cls(*side, part.start, part.stop - part.start)

    def blocks(self, block_u: int) -> int:
        """The number of blocks of `block_u` rows of the grid that hold what is here."""
        last = triton.cdiv(self.begin + self.width, self.second)
        blocks: int = triton.cdiv(last - self.begin // self.second, block_u)
        return blocks

    def block(self, element_size: int) -> tuple[int, int]:
        """Rows and columns of the grid that a program takes at most; element_size in bytes."""
        block_v = max(triton.next_power_of_2(self.second), 16)
        most = min(16384 // (element_size * block_v), 64)
        return max(min(triton.next_power_of_2(self.first), most), 16), block_v


def grid_tile(tokens: int, sides: Sequence[LeafSide], element_size: int) -> Tile:
    """The constants of both kernels; those of a module's grid are of each module."""
    whole = [side.block(element_size) for side in sides]
    programs = tokens * sum(side.blocks(u) for side, (u, _) in zip(sides, whole, strict=True))
    # With few tokens, blocks of the grid's rows are shorter, so that more programs share the work.
    filled = programs >= PROGRAMS
    rows = tuple(u if filled else 16 for u, _ in whole)
    columns = tuple(v for _, v in whole)
    numbers = max(u * v for u, v in zip(rows, columns, strict=True))
    return {
        "MODULES": len(sides),
        "RANK": sides[0].rank,
        "FIRST": tuple(side.first for side in sides),
        "SECOND": tuple(side.second for side in sides),
        "BLOCK_R": min(max(triton.next_power_of_2(sides[0].rank), 16), 128 // element_size),
        "BLOCK_U": rows,
        "BLOCK_V": columns,
        # Three TF32 products keep the accuracy of float32; for 16-bit inputs it has no effect.
        "PRECISION": "tf32x3",
        "num_warps": 8 if numbers * element_size > 8192 else 4 if filled else 2,
        "num_stages": 1,  # no cp.async: see the head of this file
        "enable_fp_fusion": True,
    }


def shrink_tile(tokens: int, sides: Sequence[LeafSide], element_size: int) -> Tile:
    """The constants of `factored_shrink_kernel`; the sides have one shape."""
    tile = grid_tile(tokens, sides, element_size)
    return tile | {name: tile[name][0] for name in ("FIRST", "SECOND", "BLOCK_U", "BLOCK_V")}


def expand_tile(tokens: int, sides: Sequence[LeafSide], element_size: int, parts: int) -> Tile:
    """The constants of `factored_expand_kernel`."""
    own = {"PARTS": parts, "BLOCK_P": triton.next_power_of_2(parts)}
    return grid_tile(tokens, sides, element_size) | own


def factored_shrink(x: Tensor, states: Tensor, places: Tensor, sides: Sequence[LeafSide]) -> Hidden:
    """`A x` from the leaves of A, for n modules that read the same x.

    Semantics, for each module: `h_k = first_k^T X second_k - shift * sum(X)`, with X = x padded
    with zeros to p x p', accumulated in float32.

    | argument | shape | meaning |
    |---|---|---|
    | x | [T, d_in] | tokens; rows may be strided |
    | states | [places, size] | the tasks' states; contiguous, dtype of x |
    | places | [T] int64 | the state of each token's task; -1 for none, which gives exactly 0 |
    | sides | n | the modules' A sides, of one shape; p * p' is at least d_in |

    Returns the parts of h.
    """
    tokens, side = len(x), sides[0]
    assert laid_out(whole=(states, places), rows=(x,))
    assert len(places) == tokens, f"expected routing for {tokens} tokens, got it for {len(places)}"
    if tokens == 0:
        return Hidden(x.new_zeros(len(sides), 1, 0, side.rank, dtype=torch.float32), None)
    tile = shrink_tile(tokens, sides, x.element_size())
    blocks = side.blocks(tile["BLOCK_U"])
    parts = x.new_empty(len(sides), blocks, tokens, side.rank, dtype=torch.float32)
    rank_blocks = triton.cdiv(side.rank, tile["BLOCK_R"])
    factored_shrink_kernel[tokens, blocks, len(sides) * rank_blocks](
        x, states, places, tuple(side.offset for side in sides), parts, tokens, side.begin,
        side.width, x.stride(0), states.stride(0), **tile,
    )  # fmt: skip
    return Hidden(parts, None)


def factored_expand(
    y: Tensor,
    hidden: Hidden,
    states: Tensor,
    places: Tensor,
    sides: Sequence[LeafSide],
    columns: tuple[int, ...],
) -> None:
    """`B h` from the leaves of B, added to y in place.

    Semantics, for each module: `y_t += sum_k h_tk (first_k (x) second_k - shift)`, flattened with
    `first` slowest and cut to d_out, in its columns of y.

    | argument | shape | meaning |
    |---|---|---|
    | y | [T, d] | output of the base layer; rows may be strided |
    | hidden | [n, P, T, r] | from `factored_shrink` |
    | states, places | | as in `factored_shrink` |
    | sides | n | the B sides, with every scale; p * p' is at least d_out |
    | columns | n | where each module's outputs begin in y |

    `h first` is rounded to the dtype of the leaves. A token without a state keeps its row of y.
    """
    modules, parts, tokens, _ = hidden.parts.shape
    assert laid_out(whole=(states, places, hidden.parts), rows=(y,))
    if tokens == 0:
        return
    tile = expand_tile(tokens, sides, y.element_size(), parts)
    blocks = max(side.blocks(u) for side, u in zip(sides, tile["BLOCK_U"], strict=True))
    factored_expand_kernel[tokens, blocks, modules](
        y, hidden.parts, states, places, tuple(side.offset for side in sides), columns,
        tuple(side.begin for side in sides), tuple(side.width for side in sides),
        tokens, y.stride(0), states.stride(0), **tile,
    )  # fmt: skip
