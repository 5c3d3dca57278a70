"""The shared path on a GPU: routed shrink and routed expand, with the routing inside the kernels.

The slow twin is `polyrex.kernels.rank_space.rank_space_reference`. Unlike in SGMV and its
descendants, nothing is grouped by task: all tokens read the same A and B, so that no tokens are
sorted, no pointers are gathered, and the cost does not depend on the number of tasks in a batch.
Tokens differ in E weights, which are applied to accumulators: neither the [T, E*r] products nor the
spread [T, E*r] ever reach memory.

Forward only: training runs the differentiable PyTorch products of `polyrex.kernels.rank_space`.

Names in kernels: i_ is an index, o_ offsets, p_ pointers, m_ masks, b_ a block on chip; names in
capitals are constants of a compiled kernel.
"""

# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

Tile = dict[str, int | bool | str]
"""The constants of a compiled kernel, and its options (with enable_fp_fusion, because Triton 3.9
warns that its default will change)."""

PROGRAMS = 256
"""Programs that fill a GPU: about two for each multiprocessor of an A100 (108) or H100 (132)."""


@triton.jit
def project(
    p_x: tl.tensor,
    p_a: tl.tensor,
    m_x: tl.tensor,
    m_a: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """`x A^T` in float32 over columns `start` to `stop`; p_x [t, 1], p_a [c, 1] point to rows."""
    o_k = tl.arange(0, BLOCK_K)[None, :]
    b_out = tl.zeros((p_x.shape[0], p_a.shape[0]), tl.float32)
    for i_k in range(start, stop, BLOCK_K):
        m_k = o_k < stop - i_k
        b_x = tl.load(p_x + i_k + o_k, mask=m_x & m_k, other=0.0)
        b_a = tl.load(p_a + i_k + o_k, mask=m_a & m_k, other=0.0)
        # Three TF32 products keep the accuracy of float32; for 16-bit inputs it has no effect.
        b_out = tl.dot(b_x, tl.trans(b_a), b_out, input_precision="tf32x3")
    return b_out


@triton.jit
def routed_shrink_kernel(
    x: tl.tensor,
    a: tl.tensor,
    weights: tl.tensor,
    parts: tl.tensor,
    tokens: tl.tensor,
    d_in: tl.tensor,
    span: tl.tensor,
    modules: tl.tensor,
    stride_x: tl.tensor,
    stride_w: tl.tensor,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """parts[s, t, n, k] = sum_e w_tne (A_nek x_t) over the s-th `span` of input columns.

    Grid: blocks of tokens; modules x blocks of ranks; spans.
    """
    rank_blocks = tl.cdiv(RANK, BLOCK_R)
    i_n, i_r = tl.program_id(1) // rank_blocks, tl.program_id(1) % rank_blocks
    i_s = tl.program_id(2)
    o_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_e = tl.arange(0, BLOCK_E)
    o_c = tl.arange(0, BLOCK_E * BLOCK_R)  # columns: expert slowest
    o_cr = i_r * BLOCK_R + o_c % BLOCK_R
    m_t = o_t < tokens
    stop = tl.minimum((i_s + 1) * span, d_in)
    b_h = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for i_e in range(0, EXPERTS, BLOCK_E):
        o_ce = i_e + o_c // BLOCK_R
        o_a = ((i_n * EXPERTS + o_ce) * RANK + o_cr).to(tl.int64)[:, None]
        m_a = ((o_ce < EXPERTS) & (o_cr < RANK))[:, None]
        b_p = project(x + o_t * stride_x, a + o_a * d_in, m_t, m_a, i_s * span, stop, BLOCK_K)
        p_w = weights + o_t * stride_w + i_n * EXPERTS + i_e + o_e[None, :]
        b_w = tl.load(p_w, mask=m_t & (i_e + o_e < EXPERTS)[None, :], other=0.0).to(tl.float32)
        b_h += tl.sum(b_w[:, :, None] * tl.reshape(b_p, (BLOCK_T, BLOCK_E, BLOCK_R)), 1)
    o_h = ((i_s * tokens + o_t) * modules + i_n) * RANK + o_r[None, :]
    tl.store(parts + o_h, b_h, mask=m_t & (o_r < RANK)[None, :])


@triton.jit
def routed_expand_kernel(
    y: tl.tensor,
    h: tl.tensor,
    b: tl.tensor,
    weights: tl.tensor,
    tokens: tl.tensor,
    d_out: tl.tensor,
    stride_y: tl.tensor,
    stride_h: tl.tensor,
    stride_w: tl.tensor,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> None:
    """y[t, o] += sum_e w_te sum_k h_tk B_eko. Grid: blocks of tokens; blocks of outputs.

    Each output belongs to one program, so that nothing is added atomically.
    """
    o_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    o_o = (tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O))[None, :]
    o_r = tl.arange(0, BLOCK_R)
    o_e = tl.arange(0, BLOCK_E)
    o_c = tl.arange(0, BLOCK_E * BLOCK_R)
    m_t, m_o = o_t < tokens, o_o < d_out
    p_y = y + o_t * stride_y + o_o
    b_y = tl.load(p_y, mask=m_t & m_o, other=0.0)  # loaded first: it arrives during the products
    b_out = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for i_r in range(0, RANK, BLOCK_R):
        p_h = h + o_t * stride_h + i_r + o_r[None, :]
        b_h = tl.load(p_h, mask=m_t & (i_r + o_r < RANK)[None, :], other=0.0).to(tl.float32)
        for i_e in range(0, EXPERTS, BLOCK_E):
            p_w = weights + o_t * stride_w + i_e + o_e[None, :]
            b_w = tl.load(p_w, mask=m_t & (i_e + o_e < EXPERTS)[None, :], other=0.0)
            b_s = b_w.to(tl.float32)[:, :, None] * b_h[:, None, :]
            b_s = tl.reshape(b_s, (BLOCK_T, BLOCK_E * BLOCK_R)).to(b.dtype.element_ty)
            o_ce, o_cr = i_e + o_c // BLOCK_R, i_r + o_c % BLOCK_R
            o_b = (o_ce * RANK + o_cr).to(tl.int64)[:, None]
            m_b = ((o_ce < EXPERTS) & (o_cr < RANK))[:, None]
            b_b = tl.load(b + o_b * d_out + o_o, mask=m_b & m_o, other=0.0)
            b_out = tl.dot(b_s, b_b, b_out, input_precision="tf32x3")
    tl.store(p_y, (b_y.to(tl.float32) + b_out).to(y.dtype.element_ty), mask=m_t & m_o)


# Tiles have the same size in bytes for every type: of float32 they hold half as many numbers.


def token_block(tokens: int, element_size: int) -> int:
    """Tokens of one program, at least a matrix instruction's 16 rows; element_size in bytes."""
    padded: int = triton.next_power_of_2(tokens)
    return min(max(padded, 16), 128 // element_size)


def column_blocks(experts: int, rank: int, element_size: int) -> dict[str, int]:
    """Columns (experts x ranks) of one program at a time: at least 16, 128 of a 16-bit type."""
    columns = 256 // element_size
    block_r = min(max(triton.next_power_of_2(rank), 16), columns // 2)
    return {
        "BLOCK_E": min(triton.next_power_of_2(experts), columns // block_r),
        "BLOCK_R": block_r,
    }


def shrink_tile(tokens: int, experts: int, rank: int, element_size: int) -> Tile:
    """The constants of `routed_shrink_kernel`."""
    return {
        "EXPERTS": experts,
        "RANK": rank,
        "BLOCK_T": token_block(tokens, element_size),
        **column_blocks(experts, rank, element_size),
        "BLOCK_K": 128 // element_size,
        "num_warps": 4,
        "num_stages": 4 if tokens <= 16 else 3,
        "enable_fp_fusion": True,
    }


def expand_tile(tokens: int, experts: int, rank: int, element_size: int) -> Tile:
    """The constants of `routed_expand_kernel`."""
    block_t = token_block(tokens, element_size)
    return {
        "EXPERTS": experts,
        "RANK": rank,
        "BLOCK_T": block_t,
        **column_blocks(experts, rank, element_size),
        "BLOCK_O": 128 if block_t == 64 else 64,
        "num_warps": 8 if block_t == 64 else 4,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


def input_span(d_in: int, block_k: int, programs: int) -> int:
    """The number of input columns that one program reads: split-K, so that few tokens fill the GPU.

    It is at least two blocks, or loads could not overlap products. Partial sums go to a float32
    scratch, which is summed afterwards: with atomics, results would change from run to run.
    """
    splits = triton.cdiv(PROGRAMS, programs)
    blocks: int = triton.cdiv(triton.cdiv(d_in, block_k), splits)
    return max(blocks, 2) * block_k


def laid_out(*, whole: Sequence[Tensor], rows: Sequence[Tensor]) -> bool:
    """Whether tensors are laid out as kernels read them: contiguous, or contiguous in each row."""
    return all(t.is_contiguous() for t in whole) and all(t[:1].is_contiguous() for t in rows)


def routed_shrink(x: Tensor, a: Tensor, weights: Tensor) -> Tensor:
    """The A side of the shared path, for n modules that read the same x (packed projections).

    Semantics, for each module: `h = sum_e w_e (A_e x)`, accumulated in float32.

    | argument | shape | meaning |
    |---|---|---|
    | x | [T, d_in] | tokens; rows may be strided |
    | a | [n*E*r, d_in] | A sides, module slowest, then expert; contiguous, dtype of x |
    | weights | [T, n, E] | routing weights, any float type; rows may be strided |

    Returns h [T, n, r] float32. A row of zeros in `weights` gives exactly 0.
    """
    tokens, modules, experts = weights.shape
    rank, d_in = a.shape[0] // (modules * experts), a.shape[1]
    assert laid_out(whole=(a,), rows=(x, weights))
    if tokens == 0:
        return x.new_zeros(tokens, modules, rank, dtype=torch.float32)
    tile = shrink_tile(tokens, experts, rank, x.element_size())
    blocks = triton.cdiv(tokens, tile["BLOCK_T"]), modules * triton.cdiv(rank, tile["BLOCK_R"])
    span = input_span(d_in, int(tile["BLOCK_K"]), blocks[0] * blocks[1])
    spans = triton.cdiv(d_in, span)
    parts = x.new_empty(spans, tokens, modules, rank, dtype=torch.float32)
    strides = x.stride(0), weights.stride(0)
    routed_shrink_kernel[*blocks, spans](
        x, a, weights, parts, tokens, d_in, span, modules, *strides, **tile
    )
    return parts[0] if spans == 1 else parts.sum(0)


def routed_expand(y: Tensor, h: Tensor, b: Tensor, weights: Tensor) -> None:
    """The B side of the shared path, added to y in place.

    Semantics: `y += sum_e w_e (h B_e)`.

    | argument | shape | meaning |
    |---|---|---|
    | y | [T, d_out] | output of the base layer; rows may be strided (a slice of a packed one) |
    | h | [T, r] | from `routed_shrink`; rows may be strided |
    | b | [E*r, d_out] | experts' B sides, transposed, with every scale folded in; contiguous |
    | weights | [T, E] | routing weights, any float type; rows may be strided |

    The spread `w_e h` is rounded to the dtype of b. A row of zeros in `weights` leaves its row of y
    unchanged.
    """
    tokens, experts = weights.shape
    rank, d_out = b.shape[0] // experts, b.shape[1]
    assert laid_out(whole=(b,), rows=(y, h, weights))
    if tokens == 0:
        return
    tile = expand_tile(tokens, experts, rank, b.element_size())
    grid = triton.cdiv(tokens, tile["BLOCK_T"]), triton.cdiv(d_out, tile["BLOCK_O"])
    strides = y.stride(0), h.stride(0), weights.stride(0)
    routed_expand_kernel[grid](y, h, b, weights, tokens, d_out, *strides, **tile)
