"""What must be true of the embedded engine after every step, told from its inside.

A slow twin of its books: everything is counted anew from the requests that run.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import sha256

from polyrex.server.engines.embedded.generation import Generation
from polyrex.server.engines.embedded.prefix_cache import BLOCK, BlockPool
from polyrex.server.engines.embedded.runner import ModelRunner
from polyrex.server.engines.slots import SlotCache


def violations(runner: ModelRunner) -> list[str]:
    """What is wrong, in words; nothing, between two steps of an engine that works."""
    scheduler = runner._scheduler
    running, waiting = scheduler.running, [*scheduler.waiting]
    return [
        *_of_queues(running, waiting, scheduler._config.max_running),
        *_of_blocks(running, runner._cache.pool),
        *_of_sharing(running, runner._cache.pool),
        *_of_slots(running, runner._routing.slots),
    ]


def _of_queues(
    running: Sequence[Generation], waiting: Sequence[Generation], most: int
) -> Iterator[str]:
    if len(running) > most:
        yield f"{len(running)} requests run, at most {most} may"
    if max(Counter(map(id, [*running, *waiting])).values(), default=1) > 1:
        yield "a request is in the queues twice"
    for generation in waiting:
        if generation.blocks or generation.computed:
            yield f"a waiting request holds {len(generation.blocks)} blocks"
    for generation in running:
        if len(generation.blocks) * BLOCK < generation.computed:
            yield f"{generation.computed} tokens are in {len(generation.blocks)} blocks"


def _of_blocks(running: Sequence[Generation], pool: BlockPool) -> Iterator[str]:
    """Every block is held, kept or free, and only one of these."""
    held = Counter(block for generation in running for block in generation.blocks)
    if sorted([*held, *pool._free, *pool._kept]) != [*range(1, pool._blocks + 1)]:
        yield f"blocks are not conserved: held {held}, free {pool._free}, kept {[*pool._kept]}"
    counted = {block: count for block, count in enumerate(pool._holders) if count}
    if counted != held:
        yield f"holders are counted as {counted}, and are {dict(held)}"
    if {block: key for key, block in pool._known.items()} != pool._keys:
        yield "known blocks and their keys do not agree"
    if not pool._kept.keys() <= pool._keys.keys():
        yield "a block is kept that nobody can find"


def _of_sharing(running: Sequence[Generation], pool: BlockPool) -> Iterator[str]:
    """Only full blocks of equal content, of the same asker, are shared or known."""
    seen: dict[int, bytes] = {}
    for generation in running:
        if len({*generation.blocks}) < len(generation.blocks):
            yield "a request holds a block twice"
        keys = _keys(generation)
        for index, block in enumerate(generation.blocks):
            shared = pool._holders[block] > 1
            full = (index + 1) * BLOCK <= generation.computed
            if shared and not full:
                yield f"block {block} is shared, and not computed"
            elif shared and seen.setdefault(block, keys[index]) != keys[index]:
                yield f"block {block} is shared by requests that differ"
            if full and pool._keys.get(block, keys[index]) != keys[index]:
                yield f"block {block} is known for something else"


def _keys(generation: Generation) -> list[bytes]:
    """The keys of the request's full blocks, computed anew."""
    request = generation.request
    router = "" if request.task is None else request.task.info.router_sha256
    keys = [sha256(f"{len(router)}:{router}{request.cache_salt}".encode()).digest()]
    for start in range(0, len(generation.tokens) - BLOCK + 1, BLOCK):
        tokens = array("q", generation.tokens[start : start + BLOCK])
        keys.append(sha256(keys[-1] + tokens.tobytes()).digest())
    return keys[1:]


def _of_slots(running: Sequence[Generation], slots: SlotCache) -> Iterator[str]:
    users = Counter(
        generation.request.task.info.router_sha256
        for generation in running
        if generation.request.task is not None
    )
    if users != slots._users:
        yield f"slots are counted as {dict(slots._users)}, and are {dict(users)}"
    places = {
        (generation.slot, generation.request.task.info.router_sha256)
        for generation in running
        if generation.request.task is not None
    }
    if len({slot for slot, _ in places}) != len(users) or any(slot < 1 for slot, _ in places):
        yield f"tasks share a slot: {sorted(places)}"
