"""Work with tensors away from the thread that runs the model."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def in_passing_thread(work: Callable[[], Result]) -> Result:
    """The result of `work`, done in a thread that ends with it.

    OpenMP gives every thread that has run a parallel operation helpers of its own, for as long as
    it lives. Once there are more of them than cores, helpers sleep between two operations instead
    of waiting for the next one, and waking them takes longer than a small product does: a model's
    every layer would pay for what another thread did once.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="polyrex-passing") as executor:
        return executor.submit(work).result()
