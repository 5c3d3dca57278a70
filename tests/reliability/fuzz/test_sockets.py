"""Mutated HTTP over raw sockets, at the length of `make test`."""

from __future__ import annotations

from pathlib import Path

from reliability.fuzz.planted import GULLIBLE, ODD_HEADER, SILENT
from reliability.fuzz.rawsockets.mutations import Requests, case
from reliability.fuzz.rawsockets.run import answers, is_whole, sockets
from reliability.fuzz.served import Served, serving
from support.reliability.small_base import SmallBase

FOUND = ("5xx", "hangs", "let in without a key")


def test_mutated_requests_break_nothing(fuzzed: Served, tmp_path: Path) -> None:
    result = sockets(fuzzed, tmp_path, count=2000)
    assert result.missed == [], result.remarks
    assert list(tmp_path.iterdir()) == []


def test_odd_answers_to_odd_requests_are_found(small_base: SmallBase, tmp_path: Path) -> None:
    server, found = tmp_path / "server", tmp_path / "found"
    server.mkdir()
    found.mkdir()
    with serving(small_base, server, ODD_HEADER, SILENT, GULLIBLE) as served:
        result = sockets(served, found, count=1000)
    assert result.finds(FOUND), result.figures
    kept = sorted(found.iterdir())
    assert kept != []
    assert max(path.stat().st_size for path in kept) < 200  # what does not matter is left out


def test_the_same_seed_makes_the_same_requests() -> None:
    requests = Requests.of(["key", None])
    made = [case(requests, 3, number) for number in range(300)]
    assert made == [case(requests, 3, number) for number in range(300)]
    assert made != [case(requests, 4, number) for number in range(300)]


def test_unspoilt_requests_are_whole_and_what_is_cut_off_is_not() -> None:
    plain = Requests.of(["key"]).plain
    assert [each for each in plain if not is_whole(each)] == []
    assert [each for each in plain if is_whole(each[:-1])] == []
    assert not is_whole(b"")


def test_answers_are_read_one_after_another() -> None:
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    bad = b"HTTP/1.1 400 Bad Request\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"
    assert answers(ok + bad + ok, b"GET / ") == ([200, 400, 200], True)
    assert answers(b"", b"GET / ") == ([], True)
    assert answers(b"nonsense", b"GET / ") == ([], False)
