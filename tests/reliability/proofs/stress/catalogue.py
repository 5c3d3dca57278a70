"""The proofs of what one client, one neighbour or one fault may not do, at full length."""

from __future__ import annotations

import signal
from functools import partial

from reliability.ground import Ground
from reliability.proofs.proof import Proof
from reliability.result import Result
from support.reliability.forked import SUPERVISION
from support.reliability.stress.planted import (
    BOUNDLESS,
    FALSE_ENDS,
    FROZEN,
    HEAPING,
    POISONED,
    UNREAPED,
)
from support.reliability.stress.stub_engine import HANG

from .disconnects import GENERATED, disconnects
from .engine_dies import WITHIN, by_prompt, by_signal, engine_dies, vllm_dies
from .engine_threads import engine_threads
from .fairness import fairness
from .overload import overload
from .poison import poison_embedded, poison_vllm
from .scheduler import FREED_TWICE, SALTLESS, SLOT_KEPT, scheduler
from .shutdown import shutdown
from .soak import soak

_TIMES = 30
"""How often the engine is killed, and how often it is stopped."""


def _poison(ground: Ground, count: int, *defects: str) -> Result:
    return poison_embedded(ground.forks, ground.sqlite(), count=count, defects=defects)


def _dies(number: signal.Signals) -> Proof:
    return Proof(
        lambda ground: engine_dies(
            ground.forks, ground.sqlite(), by_signal(number), engine="hosted", times=_TIMES
        ),
        lambda ground: engine_dies(
            ground.forks,
            ground.sqlite(),
            by_signal(number),
            engine="stub",
            times=1,
            defects=[FALSE_ENDS],
        ),
        "a stream that the engine did not finish ends as if it were whole",
        ["streams that ended as if whole"],
    )


def _vllm_dies(number: signal.Signals) -> Proof:
    return Proof(
        lambda ground: vllm_dies(ground.small, ground.folder(), number, times=_TIMES),
        _dies(number).planted,
        _dies(number).defect,
        _dies(number).finds,
    )


def _soak(ground: Ground, requests: int, *defects: str) -> Result:
    return soak(ground.forks, ground.sqlite(), requests=requests, defects=defects)


STRESS = {
    "scheduler": Proof(
        lambda ground: scheduler(ground.small, rounds=200),
        lambda ground: scheduler(ground.small, rounds=20, defects=[FREED_TWICE]),
        "one block in ten that comes back to the cache is free twice",
        ["rounds with violations"],
    ),
    "scheduler-cancels": Proof(
        lambda ground: scheduler(ground.small, rounds=100, first=10_000),
        lambda ground: scheduler(ground.small, rounds=20, defects=[SLOT_KEPT]),
        "a request that is cancelled keeps its slot of the routing table",
        ["rounds with violations"],
    ),
    "engine-threads": Proof(
        lambda ground: engine_threads(ground.small, each=2500),
        lambda ground: engine_threads(ground.small, each=50, defects=[SALTLESS]),
        "the prefix cache looks neither at the tenant nor at the task",
        ["answers that differ from those alone"],
    ),
    "poison-embedded": Proof(
        partial(_poison, count=5000),
        lambda ground: _poison(ground, 200, POISONED),
        "a body that names min_tokens ends what others have under way, and its error tells a path",
        ["streams that broke", "poisons: leaks"],
    ),
    "poison-vllm": Proof(
        lambda ground: poison_vllm(ground.small, ground.folder(), count=1000),
        lambda ground: _poison(ground, 200, POISONED),
        "a body that names min_tokens ends what others have under way, and its error tells a path",
        ["streams that broke", "poisons: leaks"],
    ),
    "overload": Proof(
        lambda ground: overload(ground.forks, ground.folder(), seconds=60),
        lambda ground: overload(ground.forks, ground.folder(), seconds=5, defects=[FROZEN]),
        "the server looks at nothing else while it reads a large body, for a fifth of a second",
        ["p99 of /livez in ms", "p99 of refusals in ms"],
    ),
    "overload-unbounded": Proof(
        lambda ground: overload(ground.forks, ground.folder(), seconds=60),
        lambda ground: overload(ground.forks, ground.folder(), seconds=10, defects=[BOUNDLESS]),
        "nothing is refused, however much waits",
        ["p99 of the first token, of that at 1x"],
    ),
    "fairness": Proof(
        lambda ground: fairness(ground.forks, ground.folder(), seconds=60),
        lambda ground: fairness(ground.forks, ground.folder(), seconds=10, one_tenant=True),
        "the queue does not know one tenant from the other",
        ["not served of the modest one"],
    ),
    "soak": Proof(
        partial(_soak, requests=100_000),
        lambda ground: _soak(ground, 3000, HEAPING),
        "each request leaves 4 KiB behind, and one in 50 a task and an open file",
        ["asyncio tasks left", "descriptors left", "KiB per 10,000 requests"],
    ),
    "disconnects": Proof(
        lambda ground: disconnects(ground.forks, ground.sqlite(), count=5000),
        lambda ground: disconnects(ground.forks, ground.sqlite(), count=100, defects=[UNREAPED]),
        "the engine goes on with what nobody waits for any more",
        [GENERATED],
    ),
    "engine-hangs": Proof(
        lambda ground: engine_dies(
            ground.forks,
            ground.sqlite(),
            by_prompt(HANG),
            engine="stub",
            times=_TIMES,
            within=WITHIN + SUPERVISION.stall_seconds,
        ),
        _dies(signal.SIGKILL).planted,
        _dies(signal.SIGKILL).defect,
        _dies(signal.SIGKILL).finds,
    ),
    "engine-killed": _dies(signal.SIGKILL),
    "engine-stopped": _dies(signal.SIGSTOP),
    "vllm-killed": _vllm_dies(signal.SIGKILL),
    "vllm-stopped": _vllm_dies(signal.SIGSTOP),
    "shutdown": Proof(
        lambda ground: shutdown(ground.forks, ground.folder(), cycles=50),
        lambda ground: shutdown(ground.forks, ground.folder(), cycles=2, number=signal.SIGKILL),
        "the server is killed",
        ["answers that were cut off", "servers that did not end, or not with 0"],
    ),
}
"""Name -> proof, in the order in which they run."""
