"""What the health routes, and requests, say of an engine that fails and is started again."""

from __future__ import annotations

import json

import pytest

from polyrex.server.errors import EngineOutOfMemory, EngineRestarting, EngineStopped
from support.fake_server import FakeEngine, Serve


class Failing(FakeEngine):
    """An engine that fails once the server is ready."""

    error: Exception | None = None

    def check(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    ("error", "alive"),
    [(EngineRestarting("it is started again"), 200), (EngineStopped("it is given up"), 503)],
)
def test_an_engine_that_comes_back_by_itself_is_no_reason_to_restart_the_server(
    serve: Serve, error: Exception, alive: int
) -> None:
    engine = Failing()
    served = serve(engine)
    before = [served.client.get(path).status_code for path in ("/livez", "/readyz")]
    engine.error = error
    after = [served.client.get(path).status_code for path in ("/livez", "/readyz")]
    answer = served.complete(max_tokens=2)
    assert before == [200, 200]
    assert after == [alive, 503]
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "engine_stopped"


def test_a_stream_of_an_engine_that_fails_ends_with_an_error_and_no_done(serve: Serve) -> None:
    served = serve(FakeEngine(failure=EngineRestarting("it is started again")))
    lines = served.complete(max_tokens=5, stream=True).text.split("\n\n")
    last = lines[-2].removeprefix("data: ")  # the last one ends with a blank line
    assert "[DONE]" not in "".join(lines)
    assert json.loads(last)["error"]["code"] == "engine_stopped"


def test_too_little_memory_is_worth_another_try(serve: Serve) -> None:
    served = serve(FakeEngine(failure=EngineOutOfMemory("too little memory for this step")))
    answer = served.complete(max_tokens=5)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "engine_out_of_memory"
