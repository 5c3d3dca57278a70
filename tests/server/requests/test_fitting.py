"""How the process of a fit ends: with its result, in time, or with the server; leaving nothing."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import psutil
import pytest

from support.fake_server import Serve, Served
from support.fits.scripted import BODY, PATH, SCORED, Play, events_of, fit, until

STUCK = {
    "that sleeps": "time.sleep(600)",
    "that is stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "that says no more": "os.close(1); time.sleep(600)",
}


@pytest.mark.parametrize("ending", STUCK.values(), ids=STUCK.keys())
def test_a_worker_that_is_stuck_is_ended_and_its_place_is_free(
    serve: Serve, play: Play, tmp_path: Path, ending: str
) -> None:
    served = serve(fit_seconds=3)
    play({"event": "started"}, ending=ending)
    first, last = events_of(fit(served))
    assert first["event"] == "started"
    assert last["error"]["code"] == "fit_failed"
    assert last["error"]["message"] == "the fit took more than 3 s, and was ended"
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
    play(ending="sys.exit(3)")
    assert fit(served).status_code == 500  # and not 429


def test_a_fit_keeps_the_workers_stdin_open_and_has_no_file_with_a_name(
    served: Served, play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the worker can see when the server is gone, and nothing is left for anybody to clean."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    go = tmp_path / "go"
    asks = (
        "os.set_blocking(0, False)\n"
        "try: print(json.dumps({'event': 'closed', 'read': os.read(0, 1).decode()}), flush=True)\n"
        "except BlockingIOError: print(json.dumps({'event': 'open'}), flush=True)\n"
    )
    play(ending=f"{asks}{until(go)}\nprint(json.dumps({SCORED!r}), flush=True)")
    with served.client.stream("POST", PATH, json=BODY) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["event"] == "open"
        assert list((tmp_path / "temporary").iterdir()) == []
        go.touch()
        assert "registered" in list(lines)[-4]


def test_the_worker_may_not_ask_the_hub(
    served: Served, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    told = "print(json.dumps({'event': 'told', 'is': os.environ.get('HF_HUB_OFFLINE')}))"
    play(ending=f"{told}\nprint(json.dumps({SCORED!r}))")
    events = events_of(fit(served))
    assert events[0] == {"event": "told", "is": "1"}
    assert events[-1]["event"] == "registered"
