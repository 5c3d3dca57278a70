"""The shared path on a GPU: routed shrink and routed expand, with the routing inside the kernels.

The slow twin is `polyrex.kernels.rank_space.rank_space_reference`. Unlike in SGMV and its
descendants, nothing is grouped by task: all tokens read the same A and B, so that no tokens are
sorted, no pointers are gathered, and the cost does not depend on the number of tasks in a batch.
Tokens differ in E weights, which are applied to accumulators: neither the [T, E*r] products nor the
spread [T, E*r] ever reach memory.

A layer takes two launches, whatever modules are packed in it. The columns of A are split among
programs, so that few tokens fill the GPU (split-K); the expand adds up their parts of h. There are
few of them, in a fixed order: with atomics, results would change from run to run.

Forward only: training runs the differentiable PyTorch products of `polyrex.kernels.rank_space`.

Names in kernels: i_ is an index, o_ offsets, p_ pointers, m_ masks, b_ a block on chip; names in
capitals are constants of a compiled kernel.
"""

# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from polyrex.kernels.modules import Hidden

Tile = dict[str, Any]
"""The constants of a compiled kernel, and its options (with enable_fp_fusion, because Triton 3.9
warns that its default will change)."""

PROGRAMS = 128
"""Programs that a shrink is split into: about one for each multiprocessor of an H100 (132)."""
MOST_PARTS = 16
"""The most parts of h that an expand adds up."""
SHORTEST_SPAN = 512
"""The fewest columns of A that a program reads: shorter spans make a shrink faster, but the expand
slower by more."""
WIDE, NARROW = 256, 128
"""Columns of B that a program of an expand takes. The outputs of every module begin at a multiple
of WIDE, so that no block has two modules'."""


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
    table: tl.tensor,
    rows: tl.tensor,
    indices: tl.tensor,
    parts: tl.tensor,
    weights: tl.tensor,
    tokens: tl.tensor,
    d_in: tl.tensor,
    span: tl.tensor,
    stride_x: tl.tensor,
    stride_l: tl.tensor,
    stride_m: tl.tensor,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """parts[n, s, t, k] = sum_e w_tne (A_nek x_t) over the s-th `span` of input columns.

    Also copies w_tne to weights[n, t, e]. Grid: blocks of tokens; modules x blocks of ranks; spans.
    """
    rank_blocks = tl.cdiv(RANK, BLOCK_R)
    i_n, i_r = tl.program_id(1) // rank_blocks, tl.program_id(1) % rank_blocks
    i_s = tl.program_id(2)
    o_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_e = tl.arange(0, BLOCK_E)[None, :]
    o_c = tl.arange(0, BLOCK_E * BLOCK_R)  # columns: expert slowest
    o_cr = i_r * BLOCK_R + o_c % BLOCK_R
    m_t = o_t < tokens
    stop = tl.minimum((i_s + 1) * span, d_in)
    p_w = table + tl.load(rows + o_t, mask=m_t, other=0) * stride_l
    p_w += tl.load(indices + i_n) * stride_m
    b_h = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for i_e in range(0, EXPERTS, BLOCK_E):
        m_w = m_t & (i_e + o_e < EXPERTS)
        b_w = tl.load(p_w + i_e + o_e, mask=m_w, other=0.0).to(tl.float32)
        o_ce = i_e + o_c // BLOCK_R
        o_a = ((i_n * EXPERTS + o_ce) * RANK + o_cr).to(tl.int64)[:, None]
        m_a = ((o_ce < EXPERTS) & (o_cr < RANK))[:, None]
        b_p = project(x + o_t * stride_x, a + o_a * d_in, m_t, m_a, i_s * span, stop, BLOCK_K)
        b_h += tl.sum(b_w[:, :, None] * tl.reshape(b_p, (BLOCK_T, BLOCK_E, BLOCK_R)), 1)
        if (i_s == 0) & (i_r == 0):
            tl.store(weights + (i_n * tokens + o_t) * EXPERTS + i_e + o_e, b_w, mask=m_w)
    o_h = ((i_n * tl.num_programs(2) + i_s) * tokens + o_t) * RANK + o_r[None, :]
    tl.store(parts + o_h, b_h, mask=m_t & (o_r < RANK)[None, :])


@triton.jit
def routed_expand_kernel(
    y: tl.tensor,
    parts: tl.tensor,
    weights: tl.tensor,
    b: tl.tensor,
    starts: tl.tuple,
    columns: tl.tuple,
    widths: tl.tuple,
    tokens: tl.tensor,
    stride_y: tl.tensor,
    stride_b: tl.tensor,
    MODULES: tl.constexpr,
    PARTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> None:
    """y[t, o] += sum_e w_te sum_k h_tk B_eko. Grid: blocks of tokens; blocks of outputs.

    Module n has columns `starts[n]` and on of b, of which the first `widths[n]` are its outputs,
    and begins at column `columns[n]` of y. Each output belongs to one program, so that nothing is
    added atomically.
    """
    i_o = tl.program_id(1) * BLOCK_O
    i_n, start, column, width = 0, starts[0], columns[0], widths[0]
    for n in tl.static_range(1, MODULES):
        here = i_o >= starts[n]
        i_n = tl.where(here, n, i_n)
        start = tl.where(here, starts[n], start)
        column = tl.where(here, columns[n], column)
        width = tl.where(here, widths[n], width)
    o_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    o_o = tl.arange(0, BLOCK_O)[None, :]
    o_r = tl.arange(0, BLOCK_R)
    o_e = tl.arange(0, BLOCK_E)[None, :]
    o_c = tl.arange(0, BLOCK_E * BLOCK_R)
    o_p = tl.arange(0, BLOCK_P)[:, None, None]
    m_t, m_o = o_t < tokens, i_o - start + o_o < width
    p_y = y + o_t * stride_y + (column + i_o - start) + o_o
    b_y = tl.load(p_y, mask=m_t & m_o, other=0.0)  # loaded first: it arrives during the products
    b_out = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for i_r in range(0, RANK, BLOCK_R):
        p_h = parts + ((i_n * PARTS + o_p) * tokens + o_t[None, :, :]) * RANK + i_r + o_r
        m_h = (o_p < PARTS) & m_t[None, :, :] & (i_r + o_r < RANK)
        b_h = tl.sum(tl.load(p_h, mask=m_h, other=0.0), 0)
        for i_e in range(0, EXPERTS, BLOCK_E):
            b_s = b_h
            if weights is not None:
                p_w = weights + (i_n * tokens + o_t) * EXPERTS + i_e + o_e
                b_w = tl.load(p_w, mask=m_t & (i_e + o_e < EXPERTS), other=0.0)
                b_s = tl.reshape(b_w[:, :, None] * b_h[:, None, :], (BLOCK_T, BLOCK_E * BLOCK_R))
            o_ce, o_cr = i_e + o_c // BLOCK_R, i_r + o_c % BLOCK_R
            o_b = (o_ce * RANK + o_cr).to(tl.int64)[:, None]
            m_b = ((o_ce < EXPERTS) & (o_cr < RANK))[:, None]
            b_b = tl.load(b + o_b * stride_b + i_o + o_o, mask=m_b & m_o, other=0.0)
            b_out = tl.dot(b_s.to(b_b.dtype), b_b, b_out, input_precision="tf32x3")
    tl.store(p_y, (b_y.to(tl.float32) + b_out).to(y.dtype.element_ty), mask=m_t & m_o)


# Tiles were chosen on an H100 at the shapes of an 8B model, with T = 32 and 1,024. They have the
# same size in bytes for every type: of float32 they hold half as many numbers. They leave room for
# a GPU with 99 KiB of shared memory.


def column_blocks(experts: int, rank: int, element_size: int) -> dict[str, int]:
    """Columns (experts x ranks) of one program at a time: at least 16, 128 of a 16-bit type."""
    columns = 256 // element_size
    block_r = min(max(triton.next_power_of_2(rank), 16), columns // 2)
    return {
        "BLOCK_E": min(triton.next_power_of_2(experts), columns // block_r),
        "BLOCK_R": block_r,
    }


def shrink_tile(experts: int, rank: int, element_size: int) -> Tile:
    """The constants of `routed_shrink_kernel`."""
    return {
        "EXPERTS": experts,
        "RANK": rank,
        # Even if few of the rows are tokens: fewer would take another, slower matrix instruction.
        "BLOCK_T": 128 // element_size,
        **column_blocks(experts, rank, element_size),
        "BLOCK_K": 128 // element_size,
        "num_warps": 4,
        "num_stages": 4,
        "enable_fp_fusion": True,
    }


def expand_tile(
    tokens: int, columns: int, experts: int, rank: int, element_size: int, parts: int
) -> Tile:
    """The constants of `routed_expand_kernel`, for B sides of so many columns in all.

    More tokens a program mean that B is read less often, as long as the programs fill the GPU.
    Where B has few rows, a program rather has many columns: its tokens' parts of h would otherwise
    be more than its part of y.
    """
    thin = experts * rank <= 32
    block_t = 16
    most = 1 if tokens <= 32 else (64 if thin else 128) // element_size
    while 2 * block_t <= most and _programs(tokens, 2 * block_t, columns) >= PROGRAMS:
        block_t *= 2
    wide = thin and block_t > 16
    return {
        "EXPERTS": experts,
        "RANK": rank,
        "PARTS": parts,
        "BLOCK_T": block_t,
        "BLOCK_P": triton.next_power_of_2(parts),
        **column_blocks(experts, rank, element_size),
        "BLOCK_O": WIDE if wide else NARROW,
        "num_warps": 8 if wide else 4,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


def _programs(tokens: int, block_t: int, columns: int) -> int:
    """The programs of an expand."""
    programs: int = triton.cdiv(tokens, block_t) * triton.cdiv(columns, NARROW)
    return programs


def input_span(d_in: int, block_k: int, programs: int) -> int:
    """The number of input columns that one program reads, if `programs` read each column."""
    splits = min(max(PROGRAMS // programs, 1), MOST_PARTS)
    blocks: int = triton.cdiv(triton.cdiv(d_in, block_k), splits)
    return max(blocks * block_k, SHORTEST_SPAN)


def laid_out(*, whole: Sequence[Tensor], rows: Sequence[Tensor]) -> bool:
    """Whether tensors are laid out as kernels read them: contiguous, or contiguous in each row."""
    return all(t.is_contiguous() for t in whole) and all(t[:1].is_contiguous() for t in rows)


@dataclass(frozen=True)
class OutputSides:
    """The B sides of n modules side by side, and the columns of y to which each adds."""

    values: Tensor  # [E*r, columns], each module's padded to whole blocks
    starts: tuple[int, ...]
    columns: tuple[int, ...]
    widths: tuple[int, ...]

    @classmethod
    def of(cls, sides: Sequence[tuple[int, Tensor]]) -> OutputSides:
        """Each module's first column of y, and its B side [E*r, d_out], with every scale in it."""
        padded = [F.pad(side, (0, -side.shape[1] % WIDE)) for _, side in sides]
        widths = [side.shape[1] for side in padded]
        return cls(
            torch.cat(padded, 1).contiguous(),
            tuple(itertools.accumulate(widths[:-1], initial=0)),
            tuple(column for column, _ in sides),
            tuple(side.shape[1] for _, side in sides),
        )


@dataclass(frozen=True)
class TableRows:
    """The rows of a routing table that T tokens read, and the modules of a layer in them."""

    table: Tensor  # [L, M, W], any float type, contiguous
    rows: Tensor  # [T] integers
    indices: Tensor  # [n] integers


def routed_shrink(x: Tensor, a: Tensor, routing: TableRows) -> Hidden:
    """The A side of the shared path, for n modules that read the same x (packed projections).

    Semantics, for each module: `h = sum_e w_e (A_e x)`, accumulated in float32.

    | argument | shape | meaning |
    |---|---|---|
    | x | [T, d_in] | tokens; rows may be strided |
    | a | [n*E*r, d_in] | A sides, module slowest, then expert; contiguous, dtype of x |
    | routing | [L, M, E], [T], [n] | the table of routing weights, and what is read of it |

    Returns the parts of h, and the weights that were read. A row of zeros gives exactly 0.
    """
    table, rows, indices = routing.table, routing.rows, routing.indices
    (tokens, d_in), modules, experts = x.shape, len(indices), table.shape[2]
    rank = a.shape[0] // (modules * experts)
    assert laid_out(whole=(a, table, rows, indices), rows=(x,))
    assert len(rows) == tokens, f"expected routing for {tokens} tokens, got it for {len(rows)}"
    if tokens == 0:
        return Hidden(*(x.new_zeros(modules, *size, dtype=torch.float32)
                        for size in ((1, 0, rank), (0, experts))))  # fmt: skip
    tile = shrink_tile(experts, rank, x.element_size())
    blocks = triton.cdiv(tokens, tile["BLOCK_T"]), modules * triton.cdiv(rank, tile["BLOCK_R"])
    span = input_span(d_in, tile["BLOCK_K"], blocks[0] * blocks[1])
    spans = triton.cdiv(d_in, span)
    parts = x.new_empty(modules, spans, tokens, rank, dtype=torch.float32)
    weights = x.new_empty(modules, tokens, experts, dtype=torch.float32)
    strides = x.stride(0), table.stride(0), table.stride(1)
    routed_shrink_kernel[*blocks, spans](
        x, a, table, rows, indices, parts, weights, tokens, d_in, span, *strides, **tile
    )
    return Hidden(parts, weights)


def routed_expand(y: Tensor, hidden: Hidden, b: OutputSides) -> None:
    """The B side of the shared path, added to y in place, for n packed modules.

    Semantics, for each module: `y += sum_e w_e (h B_e)`, in its columns of y.

    | argument | shape | meaning |
    |---|---|---|
    | y | [T, d] | output of the base layer; rows may be strided |
    | hidden | [n, P, T, r], [n, T, E] | from a shrink; without weights, E is 1 and they are 1 |
    | b | [E*r, columns] | the B sides |

    The spread `w_e h` is rounded to the dtype of b. A row of zeros in the weights leaves its row of
    y unchanged.
    """
    modules, parts, tokens, rank = hidden.parts.shape
    experts = 1 if hidden.weights is None else hidden.weights.shape[2]
    assert laid_out(whole=(b.values, hidden.parts), rows=(y,))
    assert len(y) == tokens, f"expected y for {tokens} tokens, got it for {len(y)}"
    if tokens == 0:
        return
    columns = b.values.shape[1]
    tile = expand_tile(tokens, columns, experts, rank, b.values.element_size(), parts)
    grid = triton.cdiv(tokens, tile["BLOCK_T"]), triton.cdiv(columns, tile["BLOCK_O"])
    routed_expand_kernel[grid](
        y, *hidden, b.values, b.starts, b.columns, b.widths, tokens, y.stride(0), columns,
        MODULES=modules, **tile,
    )  # fmt: skip
