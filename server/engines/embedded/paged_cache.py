"""The key-value cache in blocks, and the attention of a packed batch over it.

A batch is one row of tokens of many requests. Each request attends only to its own blocks, so no
request's arithmetic involves another's keys. transformers passes the queries, keys and values of
each layer to `attend`, which is registered as an attention implementation; the step's
`AttentionPlan` reaches it as a keyword argument of the model's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from polyrex.server.errors import StartError

ATTENTION = "polyrex_paged"
BLOCK = 16  # tokens
_SMALLEST_GROUP = 8  # blocks; shorter decoding requests share one padded product


class Stored(Protocol):
    """A request as the cache sees it."""

    @property
    def blocks(self) -> list[int]: ...

    @property
    def computed(self) -> int: ...


StoredT = TypeVar("StoredT", bound=Stored, covariant=True)


@dataclass(frozen=True)
class Span(Generic[StoredT]):
    """The next `count` tokens of a request, after the `computed` ones in the cache."""

    request: StoredT
    count: int


class _Decode(NamedTuple):
    """Consecutive tokens of a batch, each of a different request, padded to one length."""

    start: int
    blocks: Tensor  # [requests, blocks], padded with block 0
    mask: Tensor  # [requests, 1, 1, blocks * BLOCK], true for the keys of the request


class _Prefill(NamedTuple):
    """Several tokens of one request: `start` to `end` of the batch."""

    start: int
    end: int
    blocks: Tensor  # [blocks]
    mask: Tensor | None  # [tokens, keys]; None for the first tokens, whose attention is causal


@dataclass(frozen=True)
class AttentionPlan:
    """Where the tokens of one forward pass write their keys and values, and which they read."""

    cache: PagedCache
    write: Tensor  # [tokens], positions in the flattened cache
    decodes: tuple[_Decode, ...]
    prefills: tuple[_Prefill, ...]


class PagedCache:
    """Keys and values of all layers, in blocks of 16 tokens, each owned by one request.

    Requests share nothing. Block 0, which pads, belongs to no request and stays zero. A block is
    zeroed when it is handed out: a masked key has weight 0, but 0 times the NaN that a diverged
    request may have left behind would not be 0.
    """

    def __init__(
        self, config: PreTrainedConfig, tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = _head_shape(config)
        self._blocks = tokens // BLOCK
        size = (config.num_hidden_layers, 2, self._blocks + 1, BLOCK, *shape)
        self.storage = torch.zeros(size, dtype=dtype, device=device)
        self._free = list(range(self._blocks, 0, -1))

    @property
    def usage(self) -> float:
        """The share of blocks in use, from 0 to 1."""
        return 1 - len(self._free) / self._blocks

    def reserve(self, blocks: list[int], tokens: int) -> bool:
        """Extend a request's blocks to hold `tokens`; False, unchanged, if too few are free."""
        missing = -(-tokens // BLOCK) - len(blocks)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block = self._free.pop()
            self.storage[:, :, block].zero_()
            blocks.append(block)
        return True

    def release(self, blocks: list[int]) -> None:
        """Take a request's blocks back; the list is empty afterwards."""
        self._free.extend(blocks)
        blocks.clear()

    def plan(self, spans: Sequence[Span[Stored]]) -> AttentionPlan:
        """The attention of a packed batch, whose spans are in `packing_order`."""
        device = self.storage.device
        write = [
            request.blocks[position // BLOCK] * BLOCK + position % BLOCK
            for request, count in ((span.request, span.count) for span in spans)
            for position in range(request.computed, request.computed + count)
        ]
        decodes, prefills, start = [], [], 0
        for key, members in groupby(spans, _group):
            group = list(members)
            if key:
                decodes.append(self._decode(start, [span.request for span in group]))
            else:
                prefills += self._prefills(start, group)
            start += sum(span.count for span in group)
        return AttentionPlan(
            self, torch.tensor(write, device=device), tuple(decodes), tuple(prefills)
        )

    def _decode(self, start: int, requests: list[Stored]) -> _Decode:
        device = self.storage.device
        lengths = torch.tensor([request.computed + 1 for request in requests], device=device)
        width = -(-int(max(request.computed + 1 for request in requests)) // BLOCK)
        padded = [(request.blocks + [0] * width)[:width] for request in requests]
        mask = torch.arange(width * BLOCK, device=device) < lengths[:, None]
        return _Decode(start, torch.tensor(padded, device=device), mask[:, None, None])

    def _prefills(self, start: int, spans: list[Span[Stored]]) -> list[_Prefill]:
        device, plans = self.storage.device, []
        for span in spans:
            request, count = span.request, span.count
            keys = request.computed + count
            blocks = torch.tensor(request.blocks[: -(-keys // BLOCK)], device=device)
            mask = None
            if request.computed:
                last = torch.arange(request.computed, keys, device=device)[:, None]
                mask = torch.arange(len(blocks) * BLOCK, device=device) <= last
            plans.append(_Prefill(start, start + count, blocks, mask))
            start += count
        return plans


def packing_order(span: Span[Stored]) -> tuple[int, int]:
    """Sort key of the spans of a batch: first those of one token, shortest context first."""
    return (0, span.request.computed) if span.count == 1 else (1, 0)


def use_paged_attention(model: nn.Module) -> None:
    """Make a transformers model attend by the `AttentionPlan` that its forward takes as `plan`.

    Raises StartError for a model with another attention than full causal attention.
    """
    config: Any = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        raise StartError(
            f"{type(model).__name__}: the embedded engine runs models with full attention in every "
            f"layer, this one has {', '.join(sorted(kinds))}"
        )
    AttentionInterface.register(ATTENTION, attend)
    model.set_attn_implementation(ATTENTION)  # type: ignore[operator]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    plan: AttentionPlan | None = None,
    **_: Any,  # arguments that transformers passes to every implementation, such as dropout
) -> tuple[Tensor, None]:
    """Write the batch's keys and values to the cache, then let every request attend to its own.

    query [1, H, T, d], key and value [1, KV, T, d]. Returns [1, T, H, d], as transformers expects.
    """
    assert plan is not None, "only the engine runs this model, with an attention plan"
    layer: Any = module.layer_idx
    keys, values = plan.cache.storage[layer]  # each [blocks, BLOCK, KV, d]
    keys.view(-1, *keys.shape[2:]).index_copy_(0, plan.write, key[0].transpose(0, 1))
    values.view(-1, *values.shape[2:]).index_copy_(0, plan.write, value[0].transpose(0, 1))
    out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    for decode in plan.decodes:
        rows = slice(decode.start, decode.start + len(decode.blocks))
        out[0, rows] = _attend_decode(query[0, :, rows], keys, values, decode, scaling)
    for prefill in plan.prefills:
        rows = slice(prefill.start, prefill.end)
        own = key[:, :, rows], value[:, :, rows]
        if prefill.mask is not None:
            blocks = prefill.blocks[None]
            own = _gather(keys, blocks), _gather(values, blocks)
        attended = F.scaled_dot_product_attention(
            query[:, :, rows],
            *own,
            attn_mask=prefill.mask,
            is_causal=prefill.mask is None,
            scale=scaling,
            enable_gqa=True,
        )
        out[:, rows] = attended.transpose(1, 2)
    return out, None


def _attend_decode(
    query: Tensor, keys: Tensor, values: Tensor, decode: _Decode, scaling: float | None
) -> Tensor:
    """The attention [requests, H, d] of queries [H, requests, d]."""
    heads, requests, size = query.shape
    # The query heads of a key head are consecutive: they become its query rows.
    rows = query.transpose(0, 1).reshape(requests, keys.shape[2], -1, size)
    attended = F.scaled_dot_product_attention(
        rows,
        _gather(keys, decode.blocks),
        _gather(values, decode.blocks),
        attn_mask=decode.mask,
        scale=scaling,
    )
    return attended.reshape(requests, heads, size)


def _gather(cache: Tensor, blocks: Tensor) -> Tensor:
    """Each request's blocks, [requests, KV, keys, d], from a layer's [blocks, BLOCK, KV, d]."""
    chosen = cache.index_select(0, blocks.view(-1))
    return chosen.view(len(blocks), -1, *cache.shape[2:]).transpose(1, 2)


def _group(span: Span[Stored]) -> int:
    """0 for prefills; padding within one number at most doubles a decoding request's length."""
    if span.count > 1:
        return 0
    return max(_SMALLEST_GROUP, span.request.computed // BLOCK).bit_length()


def _head_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """The number of key-value heads, and the size of each."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, size
