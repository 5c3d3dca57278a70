"""The routed low-rank product on the shared path.

It never builds the weights of a task, and its cost does not depend on the number of tasks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rank_space_reference(x: Tensor, a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """The slow float32 twin of `rank_space`: builds A_t and B_t of every token, in a loop.

    Takes the same arguments. Returns float32 [T, d_out].
    """
    x, a, b, weights = (t.float() for t in (x, a, b, weights))
    splits, experts = weights.shape[1:]
    rank = a.shape[1] // experts
    a_se = a.view(splits, experts, rank, -1)  # [S, E, r, d_in/S]
    b_se = b.view(splits, experts, rank, -1)  # [S, E, r, d_out/S]
    out = x.new_empty(len(x), splits * b.shape[2])
    for t in range(len(x)):
        a_t = torch.cat(
            [torch.einsum("e,eri->ri", weights[t, s], a_se[s]) for s in range(splits)], 1
        )
        b_t = torch.cat([torch.einsum("e,ero->or", weights[t, s], b_se[s]) for s in range(splits)])
        out[t] = b_t @ (a_t @ x[t])
    return out


def rank_space(x: Tensor, a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """`delta_t = (sum_e w_te B_e)(sum_e w_te A_e) x_t`, block by block if S > 1.

    Semantics for S = 1: `h = sum_e w_e (A_e x)`; `delta = sum_e w_e (B_e h)`. With S splits, the
    products of all input blocks are summed into one h, and output block s has weights of its own.

    | argument | shape | meaning |
    |---|---|---|
    | x | [T, d_in] | tokens |
    | a | [S, E*r, d_in/S] | experts' A sides, expert slowest |
    | b | [S, E*r, d_out/S] | experts' B sides, transposed, with every scale folded in |
    | weights | [T, S, E] | routing weights, same dtype as x; a row of zeros gives exactly 0 |

    Returns [T, d_out] in the dtype of x.
    """
    tokens, splits, experts = weights.shape
    rank = a.shape[1] // experts
    if splits == 1:
        shrunk = F.linear(x, a[0]).view(tokens, experts, rank)
        columns = weights.view(tokens, experts, 1)
        # Products and a sum: bmm is slow on many tiny matrices.
        hidden = (shrunk * columns).sum(1, keepdim=True)  # [T, 1, r]
        return (hidden * columns).view(tokens, experts * rank) @ b[0]
    blocks = x.view(tokens, splits, a.shape[2]).transpose(0, 1)  # [S, T, d_in/S]
    shrunk = torch.bmm(blocks, a.transpose(1, 2)).view(splits, tokens, experts, rank)
    by_token = shrunk.permute(1, 0, 2, 3).reshape(tokens, splits * experts, rank)
    hidden = torch.bmm(weights.reshape(tokens, 1, splits * experts), by_token)  # [T, 1, r]
    spread = torch.bmm(weights.reshape(tokens, splits * experts, 1), hidden)  # [T, S*E, r]
    by_split = spread.view(tokens, splits, experts * rank).transpose(0, 1)
    return torch.bmm(by_split, b).transpose(0, 1).flatten(1)
