"""The factored contraction on a GPU: sides of TLoRA and TensorPoly, read as leaves only.

Row k of a side is `first_k (x) second_k - shift_k`, cut to the dimension. If the d numbers of an
input are laid out as a grid X of p x p', padded with zeros, then `A x` is a product of X with p'
numbers for each row of A, and a weighted sum with p: about sqrt(d) numbers are read for each row,
of which the materialised side has d. A layer's whole inventory (N*E*r*q numbers a side) fits in
on-chip memory.

A program takes one token and some rows of its grid, which are the rows of a matrix instruction, so
that tokens need neither share leaves nor be sorted by task. Leaves are read with plain loads, never
with cp.async, which bypasses L1: if tokens share leaves, the next program finds them there.

The slow twins are materialised products, in the tests. Like rank_space.py, this is forward only,
and names in kernels follow the same rules.
"""

# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rank_space import PROGRAMS, Tile, column_blocks, laid_out


@triton.jit
def factored_shrink_kernel(
    x: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    shift: tl.tensor,
    rows: tl.tensor,
    weights: tl.tensor,
    parts: tl.tensor,
    tokens: tl.tensor,
    d_in: tl.tensor,
    stride_x: tl.tensor,
    stride_w: tl.tensor,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS_A_SHIFT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """parts[i, t, k] = sum_e w_te (first_ek^T X_t second_ek - shift_ek sum(X_t)), rows u of X_t.

    Grid: tokens; blocks i of the grid's rows; blocks of ranks.
    """
    i_t, i_u, i_r = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    i_d = 0 if rows is None else tl.load(rows + i_t)
    o_u = i_u * BLOCK_U + tl.arange(0, BLOCK_U)
    o_v = tl.arange(0, BLOCK_V)[None, :]
    o_x = o_u[:, None] * SECOND + o_v
    m_v = o_v < SECOND
    b_x = tl.load(x + i_t * stride_x + o_x, mask=m_v & (o_x < d_in), other=0.0)
    total = tl.sum(tl.sum(b_x.to(tl.float32), 1), 0)
    o_c = tl.arange(0, BLOCK_E * BLOCK_R)
    o_r = i_r * BLOCK_R + o_c % BLOCK_R
    b_h = tl.zeros((BLOCK_R,), tl.float32)
    for i_e in range(0, EXPERTS, BLOCK_E):
        o_e = i_e + o_c // BLOCK_R
        o_l = (i_d + o_e) * RANK + o_r
        m_l = (o_e < EXPERTS) & (o_r < RANK)
        b_second = tl.load(second + o_l[:, None] * SECOND + o_v, mask=m_l[:, None] & m_v, other=0.0)
        m_first = m_l[None, :] & (o_u < FIRST)[:, None]
        b_first = tl.load(first + o_l[None, :] * FIRST + o_u[:, None], mask=m_first, other=0.0)
        b_grid = tl.dot(b_x.to(b_second.dtype), tl.trans(b_second), input_precision=PRECISION)
        b_p = tl.sum(b_grid * b_first.to(tl.float32), 0)
        if shift is not None:
            b_shift = tl.load(shift + o_l // ROWS_A_SHIFT, mask=m_l, other=0.0)
            b_p -= total * b_shift.to(tl.float32)
        if weights is not None:
            b_p *= tl.load(weights + i_t * stride_w + o_e, mask=m_l, other=0.0).to(tl.float32)
        b_h += tl.sum(tl.reshape(b_p, (BLOCK_E, BLOCK_R)), 0)
    o_h = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    tl.store(parts + (i_u * tokens + i_t) * RANK + o_h, b_h, mask=o_h < RANK)


@triton.jit
def factored_expand_kernel(
    y: tl.tensor,
    h: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    shift: tl.tensor,
    rows: tl.tensor,
    weights: tl.tensor,
    d_out: tl.tensor,
    stride_y: tl.tensor,
    stride_h: tl.tensor,
    stride_w: tl.tensor,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS_A_SHIFT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Y_t += sum_e w_te sum_k h_tk (first_ek second_ek^T - shift_ek), rows u of the grid Y_t.

    Grid: tokens; blocks of the grid's rows.
    """
    i_t, i_u = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_d = 0 if rows is None else tl.load(rows + i_t)
    o_u = i_u * BLOCK_U + tl.arange(0, BLOCK_U)
    o_v = tl.arange(0, BLOCK_V)[None, :]
    o_y = o_u[:, None] * SECOND + o_v
    m_v = o_v < SECOND
    m_y = m_v & (o_y < d_out)
    p_y = y + i_t * stride_y + o_y
    b_y = tl.load(p_y, mask=m_y, other=0.0)
    b_out = tl.zeros((BLOCK_U, BLOCK_V), tl.float32)
    b_level = tl.zeros((BLOCK_C,), tl.float32)
    for i_c in range(0, EXPERTS * RANK, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)  # columns: expert slowest, as the leaves lie
        m_c = o_c < EXPERTS * RANK
        o_l = i_d * RANK + o_c
        b_s = tl.load(h + i_t * stride_h + o_c % RANK, mask=m_c, other=0.0).to(tl.float32)
        if weights is not None:
            p_w = weights + i_t * stride_w + o_c // RANK
            b_s *= tl.load(p_w, mask=m_c, other=0.0).to(tl.float32)
        m_first = m_c[None, :] & (o_u < FIRST)[:, None]
        b_first = tl.load(first + o_l[None, :] * FIRST + o_u[:, None], mask=m_first, other=0.0)
        b_second = tl.load(second + o_l[:, None] * SECOND + o_v, mask=m_c[:, None] & m_v, other=0.0)
        b_left = (b_first.to(tl.float32) * b_s[None, :]).to(b_second.dtype)
        b_out = tl.dot(b_left, b_second, b_out, input_precision=PRECISION)
        if shift is not None:
            b_shift = tl.load(shift + o_l // ROWS_A_SHIFT, mask=m_c, other=0.0)
            b_level += b_s * b_shift.to(tl.float32)
    b_out += b_y.to(tl.float32) - tl.sum(b_level, 0)
    tl.store(p_y, b_out.to(y.dtype.element_ty), mask=m_y)


class Sides(NamedTuple):
    """The leaves and their precision: with tokens and experts, all that tiles depend on."""

    rank: int
    first: int  # p
    second: int  # p'
    element_size: int  # of the leaves, in bytes
    precision: str  # of products of float32 leaves

    @classmethod
    def of(cls, first: Tensor, second: Tensor, activations: Tensor) -> Sides:
        """Take the sizes from the leaves, and the precision from the activations.

        16-bit activations are exact in TF32, which keeps more of float32 leaves than bfloat16
        would; for float32 activations three products of TF32 keep the accuracy of float32.
        """
        precision = "tf32x3" if activations.dtype == torch.float32 else "tf32"
        (_, rank, p), p2 = first.shape, second.shape[2]
        return cls(rank, p, p2, first.element_size(), precision)


def _grid_tile(tokens: int, experts: int, sides: Sides) -> Tile:
    block_v = max(triton.next_power_of_2(sides.second), 16)
    most = min(16384 // (sides.element_size * block_v), 64)
    whole = max(min(triton.next_power_of_2(sides.first), most), 16)
    # With few tokens, blocks of the grid's rows are shorter, so that more programs share the work.
    filled = tokens * triton.cdiv(sides.first, whole) >= PROGRAMS
    block_u = whole if filled else 16
    warps = 8 if block_u * block_v * sides.element_size > 8192 else 4
    return {
        "EXPERTS": experts,
        "RANK": sides.rank,
        "FIRST": sides.first,
        "SECOND": sides.second,
        "BLOCK_U": block_u,
        "BLOCK_V": block_v,
        "PRECISION": sides.precision,
        "num_warps": warps if filled or experts > 1 else 2,
        "num_stages": 1,  # no cp.async: see the head of this file
        "enable_fp_fusion": True,
    }


def shrink_tile(tokens: int, experts: int, sides: Sides) -> Tile:
    """The constants of `factored_shrink_kernel`."""
    blocks = column_blocks(experts, sides.rank, sides.element_size)
    return {**_grid_tile(tokens, experts, sides), **blocks}


def expand_tile(tokens: int, experts: int, sides: Sides) -> Tile:
    """The constants of `factored_expand_kernel`."""
    columns = max(triton.next_power_of_2(experts * sides.rank), 16)
    return {
        **_grid_tile(tokens, experts, sides),
        "BLOCK_C": min(columns, 128 // sides.element_size),
    }


def factored_shrink(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    shift: Tensor | None,
    rows: Tensor | None,
    weights: Tensor | None = None,
) -> Tensor:
    """`A x` from the leaves of A.

    Semantics: row k of leaf set s gives `a_sk = first_sk^T X second_sk - shift_sk * sum(X)`, with X
    = x padded with zeros to p x p'; token t gets `h_k = sum_e w_te a_(rows_t + e)k`, accumulated in
    float32. TLoRA and TensorPoly-II have one set for each distinct row of the routing table, and no
    weights; TensorPoly-I has E sets, weights [T, E], and no `rows`.

    | argument | shape | meaning |
    |---|---|---|
    | x | [T, d_in] | tokens; rows may be strided |
    | first | [S, r, p] | S leaf sets, or halves of order 4; contiguous |
    | second | [S, r, p'] | p * p' is at least d_in; contiguous, dtype of `first` |
    | shift | [S, r], [S, 1], or None for 0 | subtracted by normalisation; contiguous |
    | rows | [T] integers, or None for 0 | the first leaf set of each token |
    | weights | [T, E], or None for one set of weight 1 | routing weights; rows may be strided |

    Returns h [T, r] float32. A row of zeros in `weights` gives exactly 0.
    """
    (tokens, d_in), (_, rank, p) = x.shape, first.shape
    assert laid_out(whole=_given(first, second, shift, rows), rows=_given(x, weights))
    if tokens == 0:
        return x.new_zeros(tokens, rank, dtype=torch.float32)
    experts = 1 if weights is None else weights.shape[1]
    tile = shrink_tile(tokens, experts, Sides.of(first, second, x))
    blocks = triton.cdiv(p, tile["BLOCK_U"])
    parts = x.new_empty(blocks, tokens, rank, dtype=torch.float32)
    strides = x.stride(0), 0 if weights is None else weights.stride(0)
    factored_shrink_kernel[tokens, blocks, triton.cdiv(rank, tile["BLOCK_R"])](
        x, first, second, shift, rows, weights, parts, tokens, d_in, *strides,
        ROWS_A_SHIFT=_rows_a_shift(shift, rank), **tile,
    )  # fmt: skip
    return parts[0] if blocks == 1 else parts.sum(0)


def factored_expand(
    y: Tensor,
    h: Tensor,
    first: Tensor,
    second: Tensor,
    shift: Tensor | None,
    rows: Tensor | None,
    weights: Tensor | None = None,
) -> None:
    """`B h` from the leaves of B, added to y in place.

    Semantics: `y_t += sum_e w_te sum_k h_tk b_(rows_t + e)k`, where
    `b_sk = first_sk (x) second_sk - shift_sk`, flattened with `first` slowest and cut to d_out.

    | argument | shape | meaning |
    |---|---|---|
    | y | [T, d_out] | output of the base layer; rows may be strided |
    | h | [T, r] | from `factored_shrink`, with every scale; rows may be strided |
    | first ... weights | as in `factored_shrink` | p * p' is at least d_out |

    `w h first` is rounded to the dtype of the leaves. A row of zeros in `weights` or h leaves its
    row of y unchanged.
    """
    (tokens, d_out), (_, rank, p) = y.shape, first.shape
    assert laid_out(whole=_given(first, second, shift, rows), rows=_given(y, h, weights))
    if tokens == 0:
        return
    experts = 1 if weights is None else weights.shape[1]
    tile = expand_tile(tokens, experts, Sides.of(first, second, y))
    strides = y.stride(0), h.stride(0), 0 if weights is None else weights.stride(0)
    factored_expand_kernel[tokens, triton.cdiv(p, tile["BLOCK_U"])](
        y, h, first, second, shift, rows, weights, d_out, *strides,
        ROWS_A_SHIFT=_rows_a_shift(shift, rank), **tile,
    )  # fmt: skip


def _rows_a_shift(shift: Tensor | None, rank: int) -> int:
    """The number of rows of a side that share one number of `shift`."""
    return 1 if shift is None or shift.shape[-1] == rank else rank


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]
