"""Blocks of the cache: who holds them, which are known, and which are given away first."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyrex.server.engines.embedded.prefix_cache import BlockPool

KEYS = [bytes([number]) for number in range(12)]


def known(pool: BlockPool, *keys: bytes) -> list[int]:
    """Blocks that one request took, made known and gave back."""
    blocks = [pool.take() for _ in keys]
    for block, key in zip(blocks, keys, strict=True):
        pool.remember(block, key)
    pool.release(blocks)
    return blocks


def test_a_known_block_that_nobody_holds_counts_as_free() -> None:
    pool = BlockPool(4)
    known(pool, *KEYS[:3])
    assert (pool.available, pool.usage) == (4, 0)
    assert pool.share(KEYS[0]) is not None
    assert (pool.available, pool.usage) == (3, 0.25)


def test_a_block_comes_back_when_its_last_holder_gives_it_back() -> None:
    pool = BlockPool(2)
    (block,) = known(pool, KEYS[0])
    assert [pool.share(KEYS[0]), pool.share(KEYS[0])] == [block, block]
    pool.release([block])
    assert pool.available == 1
    pool.release([block])
    assert pool.available == 2


def test_empty_blocks_are_taken_before_known_ones() -> None:
    pool = BlockPool(3)
    (block,) = known(pool, KEYS[0])
    assert block not in (pool.take(), pool.take())
    assert pool.share(KEYS[0]) == block


def test_what_was_unused_for_longest_is_given_away_first() -> None:
    pool = BlockPool(3)
    first, second, third = (known(pool, key)[0] for key in KEYS[:3])
    used_again = pool.share(KEYS[0])
    pool.release([first])
    assert used_again == first
    assert [pool.take(), pool.take(), pool.take()] == [second, third, first]
    assert [pool.share(key) for key in KEYS[:3]] == [None] * 3


def test_of_one_request_the_last_block_is_given_away_first() -> None:
    pool = BlockPool(3)
    assert [pool.take() for _ in known(pool, *KEYS[:3])] == [3, 2, 1]


def test_a_held_block_is_never_given_away() -> None:
    pool = BlockPool(1)
    known(pool, KEYS[0])
    pool.share(KEYS[0])
    assert pool.available == 0
    with pytest.raises(KeyError):
        pool.take()


def test_of_two_blocks_with_one_content_the_first_stays_known() -> None:
    pool = BlockPool(3)
    first, second = pool.take(), pool.take()
    pool.remember(first, KEYS[0])
    pool.remember(second, KEYS[0])
    assert pool.share(KEYS[0]) == first
    pool.release([second])
    assert second in (pool.take(), pool.take())


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 11)), max_size=200))
def test_every_block_is_held_or_available_and_keeps_its_content(
    steps: list[tuple[int, int]],
) -> None:
    """Any order of taking, sharing, making known and giving back, beside a count of our own."""
    pool, held, content = BlockPool(6), Counter[int](), dict[int, bytes]()
    for step, number in steps:
        block: int | None = None
        if step == 0 and pool.available:
            block = pool.take()
            assert not held[block]
            content.pop(block, None)
            held[block] += 1
        elif step == 1:
            block = pool.share(KEYS[number])
            if block is not None:
                assert content[block] == KEYS[number]
                held[block] += 1
        elif step == 2 and (own := [b for b in +held if b not in content]):
            block = own[number % len(own)]
            if KEYS[number] not in content.values():
                content[block] = KEYS[number]
            pool.remember(block, KEYS[number])
        elif step == 3 and +held:
            block = sorted(+held)[number % len(+held)]
            pool.release([block])
            held[block] -= 1
        assert pool.available == 6 - len(+held)
        assert pool.usage == pytest.approx(len(+held) / 6)
