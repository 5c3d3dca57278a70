"""Blocks of the key-value cache by their content, so that a prefix is computed once.

A full block is known by a key: the sha256 of the key before it and of the block's tokens. The
first of these keys stands for the router and for the request's cache salt. So a key names all
tokens up to the block's end, what turned them into keys and values, and whoever may read them.

A block becomes known when a token has been drawn from what it holds: it is written then, and
finite. It stays known after its requests have ended, until the room is needed.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import sha256

from polyrex.server.engines.base import GenerationRequest

from .generation import Generation

BLOCK = 16  # tokens


class BlockPool:
    """Which blocks requests hold, which are known, and which can be given away.

    Blocks are numbered from 1. A block that several requests hold is known, and full: nobody writes
    to it.
    """

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._free = list(range(blocks, 0, -1))
        self._holders = [0] * (blocks + 1)  # the number of requests that hold each block
        self._keys: dict[int, bytes] = {}  # of the known blocks
        self._known: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # known, held by none; oldest first

    @property
    def available(self) -> int:
        """The number of blocks that `take` can give."""
        return len(self._free) + len(self._kept)

    @property
    def usage(self) -> float:
        """The share of blocks that requests hold, from 0 to 1."""
        return 1 - self.available / self._blocks

    def take(self) -> int:
        """A block for new content: an empty one, or the known one that was unused for longest."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._kept.popitem(last=False)
            del self._known[self._keys.pop(block)]
        self._holders[block] = 1
        return block

    def share(self, key: bytes) -> int | None:
        """The block that is known by a key, held once more; None if there is none."""
        block = self._known.get(key)
        if block is not None:
            self._kept.pop(block, None)
            self._holders[block] += 1
        return block

    def remember(self, block: int, key: bytes) -> None:
        """Make a block known that will not be written any more; the first of equal ones stays."""
        if key not in self._known:
            self._known[key] = block
            self._keys[block] = key

    def release(self, blocks: Iterable[int]) -> None:
        """Take blocks back from a request; of the known ones, the last will be given away first."""
        for block in reversed([*blocks]):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._keys:
                self._kept[block] = None
            else:
                self._free.append(block)


class PrefixCache:
    """Finds known blocks for requests, and makes theirs known."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool

    def adopt(self, generation: Generation) -> None:
        """Give a request the known blocks that follow what it has computed.

        Its last token is always computed, because the next one is drawn from it.
        """
        blocks = generation.blocks
        for index in range(generation.computed // BLOCK, (len(generation.tokens) - 1) // BLOCK):
            block = self._pool.share(_key(generation, index))
            if block is None:
                return
            if index < len(blocks):
                self._pool.release([blocks[index]])
                blocks[index] = block
            else:
                blocks.append(block)
            generation.skip_to((index + 1) * BLOCK)

    def remember(self, generation: Generation) -> None:
        """Make the full blocks known that a request has computed."""
        full = generation.computed // BLOCK
        for index in range(generation.known, full):
            self._pool.remember(generation.blocks[index], _key(generation, index))
        generation.known = full


def _key(generation: Generation, index: int) -> bytes:
    """The key of a request's block; those before it are computed on the way, once."""
    keys = generation.keys
    if not keys:
        keys.append(_first_key(generation.request))
    while len(keys) < index + 2:
        start = (len(keys) - 1) * BLOCK
        tokens = array("q", generation.tokens[start : start + BLOCK])
        keys.append(sha256(keys[-1] + tokens.tobytes()).digest())
    return keys[index + 1]


def _first_key(request: GenerationRequest) -> bytes:
    """What stands before the first block.

    The salt already stands for the router, but for callers that come without one, the engine itself
    keeps routers apart.
    """
    router = "" if request.task is None else request.task.info.router_sha256
    return sha256(f"{len(router)}:{router}{request.cache_salt}".encode()).digest()
