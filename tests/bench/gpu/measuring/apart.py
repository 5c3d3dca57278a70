"""Measures in processes beside a part's own, so that one failure does not cost other figures.

An error of the device, such as a failed assertion in a kernel, is the end of the process that met
it. And a process that ends leaves nothing of what it had on the device.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.synchronize import Event
from typing import Any

from bench.gpu.part import Part

Measure = Callable[[Part], dict[str, Any] | None]


def processes(part: Part) -> ForkServerContext | SpawnContext:
    """What starts processes that know of the device nothing but what they find out themselves.

    In a dry run, they are copies of one that has imported all: many imports at once would take a
    small machine longer than everything else.
    """
    if not part.dry:
        return get_context("spawn")
    context = get_context("forkserver")
    main = sys.modules["__main__"].__spec__
    context.set_forkserver_preload([main.name] if main is not None else [])
    return context


class Apart:
    """A process that measures some figures of a part when its turn comes.

    It starts at once, and has imported all that it needs by then.
    """

    def __init__(self, part: Part, key: str, measure: Measure) -> None:
        """`measure` can be pickled; it may keep figures as it gets them, and return one more."""
        context = processes(part)
        self._part, self._key = part, key
        self._turn = context.Event()
        arguments = part, key, measure, self._turn
        self._process = context.Process(target=_measure, args=arguments, daemon=True)
        self._process.start()

    def run(self, least: float) -> None:
        """Have it measure, unless less than `least` seconds remain; it is ended with the part."""
        part, process = self._part, self._process
        if part.left < least:
            part.leave_out(self._key, "no time left")
            return
        self._turn.set()
        process.join(max(0.0, part.left))
        in_time = process.exitcode is not None
        process.kill()
        process.join()
        part.reload()
        if not in_time:
            part.leave_out(self._key, "its time was over")
        elif process.exitcode:
            part.leave_out(self._key, f"its process ended with status {process.exitcode}")
            if part.dry:
                raise RuntimeError(f"{self._key}: failed")


def _measure(part: Part, key: str, measure: Measure, turn: Event) -> None:
    """What the process does."""
    turn.wait()
    part.reload()
    part.try_to(key, partial(measure, part), least=0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a device that is beyond repair cannot be taken leave of
