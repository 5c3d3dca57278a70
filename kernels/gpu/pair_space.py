"""Pair-space routing (static T-REX) on a GPU: the shrink, with each task's G inside the kernel.

`delta = B G_t^T (A x)`. After the shrink comes a dense product with B: `rank_space.routed_expand`
without weights. Like rank_space.py, this is forward only, and names in kernels follow the same
rules.
"""

# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyrex.kernels.modules import Hidden

from .rank_space import TableRows, Tile, input_span, laid_out, project

GATES = 8192
"""Gates of pairs that four warps hold at a time: 64 registers for each thread."""


@triton.jit
def pair_shrink_kernel(
    x: tl.tensor,
    a: tl.tensor,
    table: tl.tensor,
    rows: tl.tensor,
    indices: tl.tensor,
    parts: tl.tensor,
    tokens: tl.tensor,
    d_in: tl.tensor,
    span: tl.tensor,
    stride_x: tl.tensor,
    stride_l: tl.tensor,
    stride_m: tl.tensor,
    SIDE_A: tl.constexpr,
    SIDE_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """parts[n, p, t, j] = sum_i G_tnij (A_ni x_t) over a block of i and a `span` of input columns.

    Grid: blocks of tokens; modules x blocks of i; spans.
    """
    i_blocks = tl.cdiv(SIDE_A, BLOCK_I)
    i_n, i_i = tl.program_id(1) // i_blocks, tl.program_id(1) % i_blocks
    i_s = tl.program_id(2)
    o_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    o_i = i_i * BLOCK_I + tl.arange(0, BLOCK_I)
    m_t, m_i = o_t < tokens, o_i < SIDE_A
    p_g = table + tl.load(rows + o_t, mask=m_t, other=0) * stride_l
    p_g = (p_g + tl.load(indices + i_n) * stride_m + o_i[None, :] * SIDE_B)[:, :, None]
    m_g = (m_t & m_i[None, :])[:, :, None]
    o_j = tl.arange(0, BLOCK_J)
    if SIDE_B <= BLOCK_J:  # loaded first: they arrive during the products
        b_g = tl.load(p_g + o_j[None, None, :], mask=m_g & (o_j < SIDE_B), other=0.0)
    p_x, p_a = x + o_t * stride_x, a + (i_n * SIDE_A + o_i).to(tl.int64)[:, None] * d_in
    stop = tl.minimum((i_s + 1) * span, d_in)
    b_p = project(p_x, p_a, m_t, m_i[:, None], i_s * span, stop, BLOCK_K)
    i_p = (i_n * tl.num_programs(2) + i_s) * i_blocks + i_i
    p_h = parts + (i_p * tokens + o_t) * SIDE_B + o_j[None, :]
    for i_j in range(0, SIDE_B, BLOCK_J):
        m_j = i_j + o_j < SIDE_B
        if SIDE_B > BLOCK_J:
            b_g = tl.load(p_g + i_j + o_j[None, None, :], mask=m_g & m_j, other=0.0)
        b_h = tl.sum(b_p[:, :, None] * b_g.to(tl.float32), 1)
        tl.store(p_h + i_j, b_h, mask=m_t & m_j[None, :])


def pair_tile(tokens: int, side_a: int, side_b: int, element_size: int) -> Tile:
    """The constants of `pair_shrink_kernel`."""
    block_t = (64 if tokens <= 256 else 128) // element_size
    block_i = min(max(triton.next_power_of_2(side_a), 16), 64)
    gates = GATES * (1 if block_t <= 32 else 2)
    return {
        "SIDE_A": side_a,
        "SIDE_B": side_b,
        "BLOCK_T": block_t,
        "BLOCK_I": block_i,
        "BLOCK_J": min(triton.next_power_of_2(side_b), max(gates // (block_t * block_i), 1)),
        "BLOCK_K": 256 // element_size,
        "num_warps": 4 if block_t <= 32 else 8,
        "num_stages": 4 if block_i <= 16 else 2,
        "enable_fp_fusion": True,
    }


def pair_shrink(x: Tensor, a: Tensor, routing: TableRows, side_b: int) -> Hidden:
    """The A side of static T-REX with each task's G, for n modules that read the same x.

    Semantics, for each module: `h = G^T (A x)`, accumulated in float32.

    | argument | shape | meaning |
    |---|---|---|
    | x | [T, d_in] | tokens; rows may be strided |
    | a | [n*I, d_in] | the rank-one experts of the A sides; contiguous, dtype of x |
    | routing | [L, M, I*J], [T], [n] | the table of G, and what is read of it |
    | side_b | J | the rank-one experts of a B side |

    Returns the parts of h. A row of zeros in the table gives exactly 0.
    """
    table, rows, indices = routing.table, routing.rows, routing.indices
    (tokens, d_in), modules = x.shape, len(indices)
    side_a = len(a) // modules
    assert laid_out(whole=(a, table, rows, indices), rows=(x,))
    assert len(rows) == tokens, f"expected routing for {tokens} tokens, got it for {len(rows)}"
    if tokens == 0:
        return Hidden(x.new_zeros(modules, 1, 0, side_b, dtype=torch.float32), None)
    tile = pair_tile(tokens, side_a, side_b, x.element_size())
    i_blocks = triton.cdiv(side_a, tile["BLOCK_I"])
    blocks = triton.cdiv(tokens, tile["BLOCK_T"]), modules * i_blocks
    span = input_span(d_in, tile["BLOCK_K"], blocks[0] * blocks[1])
    spans = triton.cdiv(d_in, span)
    parts = x.new_empty(modules, spans * i_blocks, tokens, side_b, dtype=torch.float32)
    strides = x.stride(0), table.stride(0), table.stride(1)
    pair_shrink_kernel[*blocks, spans](
        x, a, table, rows, indices, parts, tokens, d_in, span, *strides, **tile
    )
    return Hidden(parts, None)
