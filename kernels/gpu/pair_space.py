"""Pair-space routing (T-REX) on a GPU: the shrink, with the gates of the pairs inside the kernel.

`delta = B G^T (A x)`; each token's gates G [I, J] are computed elsewhere. After the shrink comes a
dense product with B: `rank_space.routed_expand` with one expert of weight 1. Like rank_space.py,
this is forward only, and names in kernels follow the same rules.
"""

# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rank_space import Tile, input_span, laid_out, project, token_block

GATES = 4096
"""Gates of pairs that one program holds at a time: 32 registers for each thread."""


@triton.jit
def pair_shrink_kernel(
    x: tl.tensor,
    a: tl.tensor,
    pairs: tl.tensor,
    parts: tl.tensor,
    tokens: tl.tensor,
    d_in: tl.tensor,
    span: tl.tensor,
    stride_x: tl.tensor,
    stride_p: tl.tensor,
    SIDE_A: tl.constexpr,
    SIDE_B: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """parts[p, t, j] = sum_i g_tij (A_i x_t) over one block of i and one `span` of input columns.

    Grid: blocks of tokens; blocks of i; spans.
    """
    i_i, i_s = tl.program_id(1), tl.program_id(2)
    o_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    o_i = i_i * BLOCK_I + tl.arange(0, BLOCK_I)
    m_t, m_i = o_t < tokens, o_i < SIDE_A
    p_x, p_a = x + o_t * stride_x, a + o_i.to(tl.int64)[:, None] * d_in
    stop = tl.minimum((i_s + 1) * span, d_in)
    b_p = project(p_x, p_a, m_t, m_i[:, None], i_s * span, stop, BLOCK_K)
    if DIAGONAL:
        m_g = m_t & m_i[None, :]
        b_g = tl.load(pairs + o_t * stride_p + o_i[None, :], mask=m_g, other=0.0)
        p_h = parts + (i_s * tokens + o_t) * SIDE_A + o_i[None, :]
        tl.store(p_h, b_p * b_g.to(tl.float32), mask=m_g)
    else:
        i_p = i_s * tl.num_programs(1) + i_i
        for i_j in range(0, SIDE_B, BLOCK_J):
            o_j = i_j + tl.arange(0, BLOCK_J)
            m_j = (o_j < SIDE_B)[None, :]
            p_g = pairs + (o_t * stride_p + o_i[None, :] * SIDE_B)[:, :, None] + o_j[None, None, :]
            m_g = (m_t & m_i[None, :])[:, :, None] & m_j[:, None, :]
            b_g = tl.load(p_g, mask=m_g, other=0.0).to(tl.float32)
            p_h = parts + (i_p * tokens + o_t) * SIDE_B + o_j[None, :]
            tl.store(p_h, tl.sum(b_p[:, :, None] * b_g, 1), mask=m_t & m_j)


def pair_tile(tokens: int, side_a: int, side_b: int, element_size: int, *, diagonal: bool) -> Tile:
    """The constants of `pair_shrink_kernel`."""
    block_t = token_block(tokens, element_size)
    block_i = min(max(triton.next_power_of_2(side_a), 16), 64)
    return {
        "SIDE_A": side_a,
        "SIDE_B": side_b,
        "DIAGONAL": diagonal,
        "BLOCK_T": block_t,
        "BLOCK_I": block_i,
        "BLOCK_J": min(triton.next_power_of_2(side_b), max(GATES // (block_t * block_i), 1)),
        "BLOCK_K": 128 // element_size,
        "num_warps": 4,
        "num_stages": 4,
        "enable_fp_fusion": True,
    }


def pair_shrink(x: Tensor, a: Tensor, pairs: Tensor) -> Tensor:
    """The A side of T-REX, gated.

    Semantics: `h = G^T (A x)`, accumulated in float32; `h = g * (A x)` in the diagonal form.

    | argument | shape | meaning |
    |---|---|---|
    | x | [T, d_in] | tokens; rows may be strided |
    | a | [I, d_in] | the rank-one experts of the A side; contiguous, dtype of x |
    | pairs | [T, I, J], or [T, I] for the diagonal | gates, any float type; rows may be strided |

    Returns h [T, J] float32 ([T, I] for the diagonal). A row of zeros in `pairs` gives exactly 0.
    """
    (tokens, d_in), side_a, diagonal = x.shape, len(a), pairs.ndim == 2
    side_b = pairs.shape[-1]
    assert laid_out(whole=(a,), rows=(x, pairs))
    if tokens == 0:
        return x.new_zeros(tokens, side_b, dtype=torch.float32)
    tile = pair_tile(tokens, side_a, side_b, x.element_size(), diagonal=diagonal)
    blocks = triton.cdiv(tokens, tile["BLOCK_T"]), triton.cdiv(side_a, tile["BLOCK_I"])
    span = input_span(d_in, int(tile["BLOCK_K"]), blocks[0] * blocks[1])
    spans = triton.cdiv(d_in, span)
    summands = spans if diagonal else spans * blocks[1]
    parts = x.new_empty(summands, tokens, side_b, dtype=torch.float32)
    strides = x.stride(0), pairs.stride(0)
    pair_shrink_kernel[*blocks, spans](x, a, pairs, parts, tokens, d_in, span, *strides, **tile)
    return parts[0] if summands == 1 else parts.sum(0)
