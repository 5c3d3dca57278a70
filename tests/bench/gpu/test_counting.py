"""What is timed and counted on a GPU, with a device that the test makes up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.gpu.measuring import profiling
from bench.gpu.measuring.profiling import DeviceWork, watched
from bench.gpu.measuring.timing import GRAPH_CALLS, REPLAYS, measure_limits, seconds_a_call

CUDA = torch.device("cuda")


class Device:
    """A device with a clock, on which a call takes as long as the test says."""

    def __init__(self) -> None:
        self.now = 0.0  # milliseconds
        self.replays = 0
        self._graphs: dict[int, list[float]] = {}
        self._recording: list[float] | None = None

    def run(self, milliseconds: float) -> None:
        """Take time, or put it into the graph that is recorded."""
        if self._recording is None:
            self.now += milliseconds
        else:
            self._recording.append(milliseconds)

    def event(self, **_: object) -> Any:
        """A torch.cuda.Event."""
        own = SimpleNamespace(at=0.0)
        own.record = lambda: setattr(own, "at", self.now)
        own.elapsed_time = lambda end: end.at - own.at
        return own

    def new_graph(self) -> Any:
        """A torch.cuda.CUDAGraph."""
        own = SimpleNamespace()

        def replay() -> None:
            self.replays += 1
            self.now += sum(self._graphs[id(own)])

        own.replay = replay
        return own

    @contextmanager
    def graph(self, own: Any) -> Iterator[None]:
        """torch.cuda.graph."""
        self._recording = []
        yield
        self._graphs[id(own)], self._recording = self._recording, None


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """The device in the place of CUDA."""
    made = Device()
    for name, fake in (
        ("Event", made.event),
        ("CUDAGraph", made.new_graph),
        ("graph", made.graph),
        ("synchronize", lambda: None),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    return made


def taking(device: Device, *milliseconds: float) -> list[Callable[[], None]]:
    """Calls that take so long on the device."""
    return [lambda each=each: device.run(each) for each in milliseconds]  # type: ignore[misc]


def test_a_call_is_timed_by_replays_of_many(device: Device) -> None:
    assert seconds_a_call(taking(device, 0.01, 0.03), CUDA) == pytest.approx(20e-6)
    assert device.replays == REPLAYS + 1  # the first is not counted
    eager, graphs = 2 * 0.04, (REPLAYS + 1) * GRAPH_CALLS * 0.02
    assert device.now == pytest.approx(eager + graphs)


def test_long_calls_are_in_the_graph_once(device: Device) -> None:
    assert seconds_a_call(taking(device, 4, 6), CUDA) == pytest.approx(5e-3)
    assert device.now == pytest.approx((2 + REPLAYS + 1) * 10)


def test_limits_are_measured_on_any_device() -> None:
    limits = measure_limits(torch.device("cpu"), torch.float32, dry=True)
    assert limits.bandwidth > 0
    assert limits.flops > 0


def test_work_is_counted_by_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def event(key: str, place: str, count: int, microseconds: float) -> Any:
        kind = SimpleNamespace(name=place)
        return SimpleNamespace(
            key=key, device_type=kind, count=count, self_device_time_total=microseconds
        )

    events = [
        event("gemm", "CUDA", 7, 500.0),
        event("Memcpy HtoD", "CUDA", 1, 20.0),
        event("cudaLaunchKernelExC", "CPU", 3, 0.0),
        event("cudaGraphLaunch", "CPU", 1, 0.0),
        event("cudaStreamSynchronize", "CPU", 9, 0.0),
    ]

    @contextmanager
    def profile(**_: object) -> Iterator[Any]:
        yield SimpleNamespace(key_averages=lambda: events)

    monkeypatch.setattr(profiling, "profile", profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with watched(CUDA) as work:
        pass
    assert (work.kernels, work.launches) == (8, 4)
    assert work.device_seconds == pytest.approx(520e-6)
    shorter = DeviceWork(kernels=2, launches=2, device_seconds=120e-6)
    assert work.a_step(shorter, 2) == {"kernels": 3, "launches": 1, "device_ms": 0.2}
