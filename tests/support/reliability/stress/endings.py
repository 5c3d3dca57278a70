"""How answers end: whole, with an error that says so, or cut off."""

from __future__ import annotations

import json
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

COMPLETIONS = "/v1/completions"
WHOLE, ERROR, CUT = "whole", "error", "cut"
_SECONDS = 120
"""A generous wait for an answer."""
_MADE = re.compile(rb'"completion_tokens": ?(\d+)')


@dataclass
class Ending:
    """One request, while it is answered and afterwards."""

    streamed: bool
    begun: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    status: int = 0
    kind: str = CUT
    at: float = 0.0  # of time.monotonic, when its last byte came
    answer: bytes = b""

    @property
    def tokens(self) -> int:
        """How many the answer says it has."""
        said = _MADE.findall(self.answer)
        return int(said[-1]) if said else 0

    def ask(self, port: int, body: Mapping[str, Any], path: str = COMPLETIONS) -> None:
        """Send the request and read the answer to its end."""
        self.answer, self.status, self.kind = b"", 0, CUT
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)) as connection:
            connection.settimeout(_SECONDS)
            connection.sendall(request_bytes(path, body))
            if not self.streamed:
                self.begun.set()
            while piece := connection.recv(1 << 16):
                self.answer += piece
                if b"data: " in self.answer:
                    self.begun.set()
        self.at = time.monotonic()
        self.begun.set()
        self._judge()

    def _judge(self) -> None:
        head, _, rest = self.answer.partition(b"\r\n\r\n")
        self.status = int(head[9:12]) if head[9:12].isdigit() else 0
        if self.status != 200:
            self.kind = ERROR if _is_error(rest) else CUT
        elif not self.streamed:
            self.kind = WHOLE if b'"finish_reason"' in rest else CUT
        elif b"data: [DONE]" in rest:
            self.kind = WHOLE if b'"finish_reason":"' in rest.replace(b": ", b":") else CUT
        else:
            self.kind = ERROR if b'data: {"error"' in rest else CUT

    def ask_until_not_whole(
        self, port: int, body: Mapping[str, Any], over: threading.Event
    ) -> None:
        """Ask again and again, until an answer lacks something, or it is over.

        However fast the engine is, and slow this process, there is always a request under way.
        """
        self.ask(port, body)
        while not over.is_set() and self.kind == WHOLE and self.tokens == body["max_tokens"]:
            self.ask(port, body)
        self.done.set()


def _is_error(body: bytes) -> bool:
    with suppress(json.JSONDecodeError, KeyError, TypeError):
        return bool(json.loads(body)["error"]["code"])
    return False


@contextmanager
def asking(
    port: int, bodies: Sequence[Mapping[str, Any]], *, again: bool = False
) -> Iterator[list[Ending]]:
    """Ask all at once; it begins when every stream has begun, and ends when all have ended.

    `again`: what has its whole answer is asked again while the context lasts. Streams then have to
    include their usage.
    """
    endings, over = [Ending(bool(body.get("stream"))) for body in bodies], threading.Event()
    if not again:
        over.set()
    threads = [
        threading.Thread(target=ending.ask_until_not_whole, args=(port, body, over))
        for ending, body in zip(endings, bodies, strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        for ending in endings:
            ending.begun.wait(_SECONDS)
        yield endings
    finally:
        over.set()
        for thread in threads:
            thread.join()


def request_bytes(path: str, body: Mapping[str, Any]) -> bytes:
    """A whole request, after which the server closes the connection."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def leave(port: int, path: str, body: Mapping[str, Any], chosen: random.Random) -> None:
    """Close the connection before the request is whole, after it, or amid the answer."""
    request, moment = request_bytes(path, body), chosen.random()
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)) as connection:
        if moment < 0.2:
            request = request[: chosen.randrange(len(request))]
        connection.sendall(request)
        if moment > 0.5:
            connection.settimeout(10)
            connection.recv(chosen.choice((1, 300, 2000)))
        if chosen.random() < 0.5:  # not by a FIN, but by a reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
