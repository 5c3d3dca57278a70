"""Tensor work outside the thread that runs the model."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def in_passing_thread(work: Callable[[], Result]) -> Result:
    """Run `work` in a thread that ends with it, and return its result.

    OpenMP gives every thread that has run a parallel operation workers of its own, which live as
    long as that thread. Once there are more workers than cores, they sleep between two operations
    instead of spinning, and waking them takes longer than a small product: every layer of a model
    would pay for what another thread did once.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="polyrex-passing") as executor:
        return executor.submit(work).result()
