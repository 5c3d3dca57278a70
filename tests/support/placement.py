"""A card that is not there: a device `cuda` whose tensors lie in the CPU's memory.

Within `Card()`, everything that asks for a tensor on `cuda` gets one that says it lies there, takes
part in autograd and in modules, and holds real numbers; arithmetic gives what it gives on the CPU.
What a card would refuse or be slow at raises an error that names the line:

- `Misplaced`: an operator whose tensors lie on different devices, or that draws on the card from a
  generator of the CPU.
- `HostSync`, within `card.decode_step()`: the host waits for the card. Within `card.graph()` it may
  not hand tensors to the card either, which a CUDA graph would forget.
- `UnequalSteps`, from `check_equal`: two steps of one size launched different operators, or
  allocated tensors of different sizes; from `check_replay`, also: they read other addresses, or
  other numbers of the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import zip_longest
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from support.card_operators import Calls, CardTensor, Operators, PlacementError, caller, memory


class HostSync(PlacementError):
    """The host waits for the card, or hands it tensors, where it must not."""


class UnequalSteps(PlacementError):
    """Two steps of one size differ in what they launch, allocate or read."""


class Launch(NamedTuple):
    """An operator or kernel on the card."""

    operator: str
    outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    """Shapes and dtypes of what it returned."""
    fixed: tuple[object, ...]
    """What a CUDA graph would keep of it: numbers of the host, and addresses from before."""
    caller: str


Watch = Literal["nothing", "syncs", "syncs and copies"]


class Card:
    """The context in which there is a card, and what happened on it."""

    def __init__(self) -> None:
        self.syncs: list[str] = []
        self.unpinned: list[str] = []
        """Copies to the card from memory that is not pinned: the host waits for these too."""
        self._watch: Watch = "nothing"
        self._stack = ExitStack()
        self._pinned: dict[int, torch.UntypedStorage] = {}
        self._recordings: list[list[Launch]] = []
        self._made: dict[int, Tensor] | None = None  # within a graph, by address

    def __enter__(self) -> Card:
        self._stack.enter_context(Operators(self))
        self._stack.enter_context(Calls(self))
        streams: dict[str, Any] = {
            "Stream": Stream,
            "current_stream": Stream,
            "stream": nullcontext,
            "is_current_stream_capturing": lambda: self._made is not None,
        }
        self._stack.enter_context(patch.multiple(torch.cuda, **streams))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def decode_step(self) -> Iterator[list[Launch]]:
        """Within it, the host must not wait for the card. Yields what is launched within it."""
        with self._watching("syncs"), self._recorded() as launches:
            yield launches

    @contextmanager
    def sync_allowed(self) -> Iterator[None]:
        """A part of a decode step in which the host may wait: it reads the drawn tokens."""
        with self._watching("nothing"):
            yield

    @contextmanager
    def graph(self) -> Iterator[list[Launch]]:
        """Within it, all must be as a CUDA graph can hold it. Yields what is launched within it."""
        before, self._made = self._made, {}
        try:
            with self._watching("syncs and copies"), self._recorded() as launches:
                yield launches
        finally:
            self._made = before

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Stands in for the capture of a CUDA graph: every replay must do what was captured."""
        function()  # warms up
        with self.graph() as captured:
            function()

        def replay() -> None:
            with self.graph() as now:
                function()
            check_replay(captured, now)

        return replay

    @contextmanager
    def _watching(self, watch: Watch) -> Iterator[None]:
        before, self._watch = self._watch, watch
        try:
            yield
        finally:
            self._watch = before

    @contextmanager
    def _recorded(self) -> Iterator[list[Launch]]:
        launches = list[Launch]()
        self._recordings.append(launches)
        try:
            yield launches
        finally:
            self._recordings.pop()

    def launched(self, operator: str, given: Sequence[object], made: Sequence[CardTensor]) -> None:
        """Note an operator or a kernel, with its arguments and what it returned."""
        if not self._recordings:
            return
        fixed = () if self._made is None else tuple(self._fixed(one) for one in given)
        outputs = tuple((tuple(t.shape), t.dtype) for t in made)
        launch = Launch(operator, outputs, fixed, caller())
        for recording in self._recordings:
            recording.append(launch)
        if self._made is not None:
            known = {memory(t) for t in given if isinstance(t, CardTensor)}
            self._made |= {memory(t): t for t in made if memory(t) not in known}

    def _fixed(self, argument: object) -> object:
        """What a graph keeps of an argument; an address within the graph is its own affair."""
        if isinstance(argument, CardTensor):
            inside = self._made is not None and memory(argument) in self._made
            return None if inside else argument.numbers.data_ptr()
        return repr(argument)

    def synced(self, operator: str) -> None:
        """Note that the host waited for the card."""
        self.syncs.append(f"{operator} at {caller()}")
        if self._watch != "nothing":
            raise HostSync(self.syncs[-1])

    def copied(self, operator: str, source: Tensor) -> None:
        """Note that a tensor of the host was copied to the card."""
        if self._watch == "syncs and copies":
            raise HostSync(f"{operator} at {caller()}: a graph would copy the same tensor again")
        if source.dim() and not self.is_pinned(source):
            self.unpinned.append(caller())

    def pin(self, tensor: Tensor) -> Tensor:
        """Note that the tensor's memory is pinned."""
        storage = tensor.untyped_storage()
        self._pinned[storage.data_ptr()] = storage
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether the tensor's memory is pinned."""
        return tensor.untyped_storage().data_ptr() in self._pinned


class Stream:
    """Stands in for a stream of the card: everything runs in the order of the program."""

    def __init__(self, device: torch.device | None = None) -> None:
        """All of them are one."""

    def wait_stream(self, other: Stream) -> None:
        """There is nothing to wait for."""


def check_equal(first: Sequence[Launch], second: Sequence[Launch]) -> None:
    """Raise UnequalSteps unless two steps launched and allocated the same."""
    _compare(first, second, 2)


def check_replay(captured: Sequence[Launch], now: Sequence[Launch]) -> None:
    """Raise UnequalSteps unless a graph of the one would do what the other did."""
    _compare(captured, now, 3)


def _compare(first: Sequence[Launch], second: Sequence[Launch], fields: int) -> None:
    for number, (one, other) in enumerate(zip_longest(first, second)):
        if one is None or other is None or one[:fields] != other[:fields]:
            raise UnequalSteps(f"launch {number}: {one} in one step, {other} in the other")
