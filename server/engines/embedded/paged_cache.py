"""The key-value cache in blocks, and the attention of a packed batch over it.

A batch is one row of tokens of many requests. Each request attends only to its own blocks, so no
request's arithmetic involves another's keys. transformers passes the queries, keys and values of
each layer to `attend`, which is registered as an attention implementation; the step's
`AttentionPlan` reaches it as a keyword argument of the model's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedConfig

from polyrex.server.errors import StartError

from .prefix_cache import BLOCK, BlockPool

ATTENTION = "polyrex_paged"
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
    mask: Tensor  # [requests, 1, 1, blocks * BLOCK], true or 0 for the keys of the request


class _Prefill(NamedTuple):
    """Several tokens of one request: `start` to `end` of the batch."""

    start: int
    end: int
    past: tuple[Tensor, Tensor] | None
    """The blocks of the request, [blocks], and which keys each token reads, [tokens, keys]; None
    for the first tokens, which attend to themselves, causally."""


class _Prompts(NamedTuple):
    """The first tokens of several requests, padded to one length."""

    padded: Tensor  # [requests, length], of tokens of the batch; padding repeats the first
    tokens: Tensor  # [n], all tokens of these requests in the batch
    places: Tensor  # [n], where they are among the padded ones


@dataclass(frozen=True)
class AttentionPlan:
    """Where the tokens of one forward pass write their keys and values, and which they read."""

    cache: PagedCache
    write: Tensor  # [tokens], positions in the flattened cache
    decodes: tuple[_Decode, ...]
    prefills: tuple[_Prefill, ...] = ()
    prompts: tuple[_Prompts, ...] = ()


class PagedCache:
    """Keys and values of all layers, in blocks of 16 tokens; `pool` knows who holds which.

    A block is written by the one request that took it, and shared when it is full. Block 0, which
    pads, belongs to no request and stays zero. A block is zeroed when it is handed out: a masked
    key has weight 0, but 0 times the NaN that a diverged request may have left behind would not be
    0.
    """

    spare: int
    """A block that belongs to no request either: tokens that only pad a batch write there."""

    pads_prompts: bool
    """Whether new prompts of similar length attend in one call, padded. On a GPU, a call for each
    takes longer than all padding; on a CPU, it does not."""

    def __init__(
        self, config: PreTrainedConfig, tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = _head_shape(config)
        self.pool = BlockPool(tokens // BLOCK)
        self.spare = tokens // BLOCK + 1
        size = (config.num_hidden_layers, 2, self.spare + 1, BLOCK, *shape)
        self.storage = torch.zeros(size, dtype=dtype, device=device)
        self.pads_prompts = device.type == "cuda"

    def reserve(self, blocks: list[int], tokens: int) -> bool:
        """Extend a request's blocks to hold `tokens`; False, unchanged, if too few are free."""
        missing = -(-tokens // BLOCK) - len(blocks)
        if missing > self.pool.available:
            return False
        for _ in range(missing):
            block = self.pool.take()
            self.storage[:, :, block].zero_()
            blocks.append(block)
        return True

    def release(self, blocks: list[int]) -> None:
        """Take a request's blocks back; the list is empty afterwards."""
        self.pool.release(blocks)
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
        prompts: dict[int, list[range]] = {}  # by length
        for key, members in groupby(spans, _group):
            group = list(members)
            if key:
                decodes.append(self._decode(start, [span.request for span in group]))
                start += len(group)
                continue
            for span in group:
                tokens = range(start, start + span.count)
                if self.pads_prompts and not span.request.computed:
                    prompts.setdefault(span.count.bit_length(), []).append(tokens)
                else:
                    prefills.append(self._prefill(span, tokens))
                start += span.count
        return AttentionPlan(
            self,
            torch.tensor(write, device=device),
            tuple(decodes),
            tuple(prefills),
            tuple(self._prompts(of_length) for of_length in prompts.values()),
        )

    def plan_decode(self, positions: Tensor, blocks: Tensor) -> AttentionPlan:
        """The attention of tokens of different requests, by operations of the device alone.

        positions [requests], each token's in its request; blocks [requests, blocks], padded with
        block 0.
        """
        own = blocks.gather(1, (positions // BLOCK)[:, None])[:, 0]
        keys = torch.arange(blocks.shape[1] * BLOCK, device=blocks.device)
        # A sum is what the products of all layers can use as it is; a mask of truth, each converts.
        mask = self.storage.new_zeros(len(blocks), len(keys))
        mask.masked_fill_(keys > positions[:, None], float("-inf"))
        decode = _Decode(0, blocks, mask[:, None, None])
        return AttentionPlan(self, own * BLOCK + positions % BLOCK, (decode,))

    def _decode(self, start: int, requests: list[Stored]) -> _Decode:
        device = self.storage.device
        lengths = torch.tensor([request.computed + 1 for request in requests], device=device)
        width = -(-int(max(request.computed + 1 for request in requests)) // BLOCK)
        padded = [(request.blocks + [0] * width)[:width] for request in requests]
        mask = torch.arange(width * BLOCK, device=device) < lengths[:, None]
        return _Decode(start, torch.tensor(padded, device=device), mask[:, None, None])

    def _prefill(self, span: Span[Stored], tokens: range) -> _Prefill:
        request, device = span.request, self.storage.device
        if not request.computed:
            return _Prefill(tokens.start, tokens.stop, None)
        keys = request.computed + span.count
        blocks = torch.tensor(request.blocks[: -(-keys // BLOCK)], device=device)
        last = torch.arange(request.computed, keys, device=device)[:, None]
        mask = torch.arange(len(blocks) * BLOCK, device=device) <= last
        return _Prefill(tokens.start, tokens.stop, (blocks, mask))

    def _prompts(self, prompts: Sequence[range]) -> _Prompts:
        length = max(len(tokens) for tokens in prompts)
        padded = [[*tokens, *[tokens.start] * (length - len(tokens))] for tokens in prompts]
        places = [row * length + i for row, own in enumerate(prompts) for i in range(len(own))]
        tokens = list(chain.from_iterable(prompts))
        device = self.storage.device
        return _Prompts(*(torch.tensor(each, device=device) for each in (padded, tokens, places)))


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


def attention_kernels(device: torch.device) -> AbstractContextManager[None]:
    """Within it, attention prefers kernels that take any shape at once.

    cuDNN's is the first choice of PyTorch on some GPUs, and prepares each new shape for long; here,
    shapes change with every batch.
    """
    if device.type != "cuda":
        return nullcontext()
    order = [
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    ]
    kernels: AbstractContextManager[None] = sdpa_kernel(order, set_priority=True)
    return kernels


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
    if len(plan.decodes) == 1 and len(plan.decodes[0].blocks) == query.shape[2]:
        return _attend_decode(query[0], keys, values, plan.decodes[0], scaling)[None], None
    out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    for decode in plan.decodes:
        rows = slice(decode.start, decode.start + len(decode.blocks))
        out[0, rows] = _attend_decode(query[0, :, rows], keys, values, decode, scaling)
    for prefill in plan.prefills:
        rows = slice(prefill.start, prefill.end)
        own, mask = (key[:, :, rows], value[:, :, rows]), None
        if prefill.past is not None:
            blocks, mask = prefill.past[0][None], prefill.past[1]
            own = _gather(keys, blocks), _gather(values, blocks)
        attended = F.scaled_dot_product_attention(
            query[:, :, rows],
            *own,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=True,
        )
        out[:, rows] = attended.transpose(1, 2)
    for prompts in plan.prompts:
        attended = _attend_prompts(query[0], key[0], value[0], prompts, scaling)
        out[0].index_copy_(0, prompts.tokens, attended)
    return out, None


def _attend_prompts(
    query: Tensor, key: Tensor, value: Tensor, prompts: _Prompts, scaling: float | None
) -> Tensor:
    """The attention [n, H, d] of the first tokens of requests, from the whole batch's [H, T, d].

    Padding comes after a request's own tokens, so that a causal attention never reads it.
    """
    # each [requests, H or KV, length, d]
    q, k, v = (side[:, prompts.padded].transpose(0, 1) for side in (query, key, value))
    attended = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2).flatten(0, 1)[prompts.places]


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
