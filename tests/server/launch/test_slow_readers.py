"""Clients that ask for much and read little: they are ended, and hold nobody up."""

from __future__ import annotations

import time
from contextlib import ExitStack

from support.fake_server import FakeEngine, Serve, Served
from support.sockets.raw import connected, request, rest

FEW_BYTES = 2048
MUCH = {"prompt": "x", "n": 8, "max_tokens": 3000, "logprobs": 20, "stream": True}
"""An answer of some 30 MB."""


def large(serve: Serve, **changes: float) -> Served:
    """A server with 32 places and room for MUCH."""
    return serve(FakeEngine(context_length=4096), max_in_flight=32, **changes)


def all_places_are_free(served: Served) -> bool:
    """Whether 32 completions are admitted within a generous time."""
    for _ in range(1000):
        if served.complete(prompt=["x"] * 4, n=8, max_tokens=1).status_code == 200:
            return True
        time.sleep(0.02)
    return False


def test_stalled_readers_lose_their_places(serve: Serve) -> None:
    served = large(serve, write_seconds=0.5)
    with ExitStack() as opened:
        for _ in range(4):
            stalled = opened.enter_context(connected(served.port, receive_buffer=FEW_BYTES))
            stalled.sendall(request("POST", "/v1/completions", MUCH))
        assert all_places_are_free(served)
        assert len(served.engine.aborted) == 32


def test_a_reader_of_single_bytes_is_a_stalled_one(serve: Serve) -> None:
    served = large(serve, write_seconds=0.5)
    with connected(served.port, receive_buffer=FEW_BYTES) as trickle:
        trickle.sendall(request("POST", "/v1/completions", MUCH))
        for _ in range(400):  # its own buffer holds thousands
            assert trickle.recv(1)
            if served.engine.aborted:
                break
            time.sleep(0.05)
        assert len(served.engine.aborted) == 8


def test_a_stalled_reader_of_an_answer_that_is_over_is_closed(serve: Serve) -> None:
    served = large(serve, write_seconds=0.5)
    whole = {**MUCH, "stream": False, "max_tokens": 500}
    with connected(served.port, receive_buffer=FEW_BYTES) as stalled:
        stalled.sendall(request("POST", "/v1/completions", whole))
        for _ in range(1000):
            if "write" in served.client.get("/metrics").text.partition("connections_closed")[2]:
                break
            time.sleep(0.02)
        received = len(rest(stalled))
    assert 0 < received < len(served.complete(**whole).content)


def test_a_slow_reader_that_goes_on_gets_its_whole_answer(serve: Serve) -> None:
    served = large(serve, write_seconds=1.0)
    with connected(served.port, receive_buffer=FEW_BYTES) as slow:
        slow.sendall(request("POST", "/v1/completions", {**MUCH, "max_tokens": 200}))
        time.sleep(0.5)  # until it is waited for
        assert rest(slow).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert served.engine.aborted == []


def test_a_reader_that_is_just_fast_enough_is_ended_by_the_deadline(serve: Serve) -> None:
    served = large(serve, write_seconds=60.0, request_seconds=1.0)
    with connected(served.port, receive_buffer=FEW_BYTES) as slow:
        slow.sendall(request("POST", "/v1/completions", MUCH))
        assert all_places_are_free(served)
        assert len(served.engine.aborted) == 8
        said = rest(slow)
    assert b"deadline_exceeded" in said
    assert b"[DONE]" not in said
