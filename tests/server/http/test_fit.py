"""Fitting over HTTP: the worker's output becomes events and a live task.

A script plays the worker here.
"""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from support.command_line import Finished, polyrex
from support.fake_server import Serve, Served
from support.fits.scripted import (
    BODY,
    PATH,
    ROWS,
    SCORED,
    Play,
    events_of,
    fit,
    fit_if,
    until,
)
from support.registry.waiting import transactions_that_wait
from support.tenants.identities import (
    OPERATOR_DIGESTS,
    OPERATOR_KEY,
    client_of,
    make_key,
    make_tenant,
)

from .test_faults import eventually

if TYPE_CHECKING:
    from support.random_inventory import MakeRouter


def test_fitted_task_is_registered_where_it_beats_the_base(served: Served, play: Play) -> None:
    play({"event": "started"}, {"event": "progress", "step": 1}, SCORED)
    response = fit(served)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response)
    kinds = [event["event"] for event in events]
    assert kinds == ["started", "progress", "scored", "registered"]
    assert events[-1]["task"] == served.client.get("/v1/tasks/fitted").json()
    assert response.text.endswith("data: [DONE]\n\n")


def test_worker_gets_the_servers_model_inventory_and_rows(
    served: Served, play: Play, tmp_path: Path
) -> None:
    play(SCORED)
    fit(served)
    job = json.loads((tmp_path / "job.json").read_text())
    assert job["base"] == "base"
    assert job["rows"] == ROWS
    assert job["task"] == "fitted"
    assert job["device"] == "auto"
    assert Path(job["inventory"]).exists()


@pytest.mark.parametrize("adapted", [0.25, 0.1])
def test_task_that_does_no_better_is_refused_with_its_score(
    served: Served, play: Play, adapted: float
) -> None:
    play(SCORED | {"adapted": adapted})
    last = events_of(fit(served))[-1]
    assert last["event"] == "refused"
    assert (last["base"], last["adapted"]) == (0.25, adapted)
    assert served.client.get("/v1/tasks/fitted").status_code == 404


def test_task_that_is_there_is_replaced_only_when_asked(served: Served, play: Play) -> None:
    play(SCORED)
    fit(served)
    assert fit(served).status_code == 409
    assert fit(served, replace=True).status_code == 200


def test_worker_that_fails_ends_the_events_with_its_error(served: Served, play: Play) -> None:
    play({"event": "started"}, {"event": "failed", "message": "no such thing"})
    last = events_of(fit(served))[-1]
    assert last["error"]["code"] == "fit_failed"
    assert last["error"]["message"] == "no such thing"


def test_worker_that_dies_is_an_error(served: Served, play: Play) -> None:
    play({"event": "started"}, ending="sys.exit(3)")
    assert "status 3" in events_of(fit(served))[-1]["error"]["message"]
    play(SCORED)
    assert events_of(fit(served))[-1]["event"] == "registered"  # the next one is let in


def test_router_that_does_not_fit_is_refused(served: Served, play: Play) -> None:
    play(SCORED, router=b"no router")
    assert events_of(fit(served))[-1]["error"]["code"] == "invalid_router"


def test_one_task_is_fitted_at_a_time_and_ends_with_its_client(
    served: Served, play: Play, tmp_path: Path
) -> None:
    play({"event": "started"}, ending="time.sleep(600)")
    with served.client.stream("POST", "/v1/tasks/fitted/fit", json=BODY) as response:
        lines = response.iter_lines()
        assert "started" in next(lines)
        assert fit(served, "another").status_code == 429
        worker = psutil.Process(int((tmp_path / "pid").read_text()))
    eventually(lambda: not worker.is_running())
    play(SCORED)
    # The place is free a moment after the worker has ended, in the server's own time.
    eventually(lambda: fit(served, "another").status_code == 200)


def test_a_condition_that_does_not_hold_is_told_before_the_fit(served: Served, play: Play) -> None:
    play(SCORED)
    fit_if(served, if_none_match="*").raise_for_status()
    etag = served.client.get("/v1/tasks/fitted").headers["etag"]
    for refused in (
        fit_if(served, replace=True, if_none_match="*"),
        fit_if(served, replace=True, if_match='"0"'),
        fit_if(served, "another", if_match="*"),
    ):
        assert (refused.status_code, refused.json()["error"]["code"]) == (
            412,
            "precondition_failed",
        )
    last = events_of(fit_if(served, replace=True, if_match=etag))[-1]
    assert last["event"] == "registered"


def test_a_condition_that_holds_no_more_after_the_fit_refuses_its_router(
    served: Served, play: Play, tmp_path: Path, make_router: MakeRouter
) -> None:
    go = tmp_path / "go"
    play({"event": "started"}, SCORED, ending=until(go))
    headers = {"If-None-Match": "*"}
    with served.client.stream("POST", PATH, json=BODY, headers=headers) as response:
        lines = response.iter_lines()
        assert "started" in next(lines)
        binary = {"content-type": "application/octet-stream"}
        served.client.put("/v1/tasks/fitted", content=make_router(2), headers=binary)
        go.touch()
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "precondition_failed"
    assert served.client.get("/v1/tasks/fitted").json()["version"] == 1


def test_a_fit_repeated_with_its_key_has_the_first_result(
    served: Served, play: Play, make_router: MakeRouter
) -> None:
    play(SCORED)
    first, again = (events_of(fit_if(served, idempotency_key="k"))[-1] for _ in range(2))
    assert first["event"] == again["event"] == "registered"
    assert first["task"]["version"] == again["task"]["version"] == 1
    assert fit_if(served, idempotency_key="another").status_code == 409
    play(SCORED, router=make_router(2))
    other = events_of(fit_if(served, idempotency_key="k"))[-1]
    assert other["error"]["code"] == "idempotency_mismatch"
    assert served.client.get("/v1/tasks/fitted").json()["last_version"] == 1


def test_a_tenant_without_room_for_a_task_is_told_before_the_fit(
    served: Served, play: Play
) -> None:
    play(SCORED)
    make_tenant(served.client, "acme", tasks=1)
    with client_of(served.url, make_key(served.client, "acme", "task-admin")) as acme:
        as_acme = dataclasses.replace(served, client=acme)
        assert events_of(fit(as_acme))[-1]["event"] == "registered"
        refused = fit(as_acme, "another")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "quota_exceeded")
        assert events_of(fit(as_acme, replace=True))[-1]["event"] == "registered"


def test_a_fit_is_one_of_its_tenants_requests_while_it_runs(
    served: Served, play: Play, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    play({"event": "started"}, SCORED, ending=until(go))
    make_tenant(served.client, "acme", requests_per_minute=2, concurrent=1)
    with client_of(served.url, make_key(served.client, "acme", "task-admin")) as acme:
        as_acme = dataclasses.replace(served, client=acme)
        with acme.stream("POST", PATH, json=BODY) as response:
            lines = response.iter_lines()
            assert "started" in next(lines)
            beside = as_acme.complete()
            busy = fit(served, "another")
            elsewhere = served.complete()
            go.touch()
            assert "registered" in list(lines)[-4]
        assert (beside.status_code, beside.json()["error"]["code"]) == (429, "overloaded")
        assert (busy.status_code, "acme" in busy.text) == (429, False)
        assert elsewhere.status_code == 200
        assert as_acme.complete().headers["x-ratelimit-remaining-requests"] == "0"
        refused = fit(as_acme, replace=True)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")


def test_others_are_answered_while_a_fit_waits_for_the_database(served: Served, play: Play) -> None:
    play(SCORED)
    with ThreadPoolExecutor(1) as another:
        with transactions_that_wait(served) as begun:
            waiting = another.submit(fit, served)
            assert begun.wait(30)
            answer = served.client.get("/livez")
            answered_before = waiting.done()
        assert events_of(waiting.result())[-1]["event"] == "registered"
    assert (answer.status_code, answered_before) == (200, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ROWS[:7]}, "rows: expected a list of 8 to 1024 rows, got 7"),
        ({"rows": [*ROWS, {"input": "a", "answer": "maybe", "options": ["yes", "no"]}]}, "maybe"),
        ({"rows": [*ROWS, {"input": "a", "answer": ""}]}, "rows[8]: `answer` is empty"),
        ({"rows": [*ROWS, {"input": "a", "answer": "b", "options": []}]}, "2 to 64 entries, got 0"),
        ({"instruction": ""}, "instruction"),
        ({"steps": 5}, "unknown field 'steps'"),
    ],
    ids=["few", "answer", "empty", "options", "instruction", "unknown"],
)
def test_body_that_cannot_be_fitted_is_400(
    served: Served, changes: dict[str, Any], message: str
) -> None:
    response = fit(served, **changes)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("name", "message"), [("Not A Name", "a task name matches"), ("base", "the base model's name")]
)
def test_name_that_no_task_may_have_is_400(serve: Serve, name: str, message: str) -> None:
    response = fit(serve(), name)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_tenant_cannot_fit_what_is_anothers(
    serve: Serve, play: Play, tmp_path: Path, make_router: MakeRouter
) -> None:
    served = serve(api_key_digests=OPERATOR_DIGESTS)
    play(SCORED, router=make_router(2))
    with client_of(served.url, OPERATOR_KEY) as operator:
        for tenant in ("acme", "rival"):
            make_tenant(operator, tenant)
        binary = {"content-type": "application/octet-stream"}
        operator.put("/v1/tasks/acme:one", content=make_router(1), headers=binary)
        before = operator.get("/v1/tasks/acme:one").raise_for_status().json()
        with client_of(served.url, make_key(operator, "rival", "task-admin")) as rival:
            refused = {
                (response.status_code, response.text.replace(name, "NAME"))
                for name in ("acme:one", "acme:one@1", "acme:two", "nobody:nothing")
                for replace in (False, True)
                for response in [
                    rival.post(f"/v1/tasks/{name}/fit", json=BODY | {"replace": replace})
                ]
            }
            assert {status for status, _ in refused} == {404}
            assert len(refused) == 1
            assert not (tmp_path / "job.json").exists()
            own = events_of(rival.post("/v1/tasks/one/fit", json=BODY))[-1]["task"]
            assert (own["tenant"], own["version"]) == ("rival", 1)
        assert operator.get("/v1/tasks/acme:one").json() == before


def polyrex_fit(served: Served, rows: Path, *options: str) -> Finished:
    command = ("fit", "--task", "fitted", "--rows", rows, "--instruction", "Is it?", *options)
    return polyrex(*command, "--server", served.url)


def test_command_fits_and_prints_the_task(served: Served, play: Play, tmp_path: Path) -> None:
    play({"event": "progress", "step": 1, "steps": 2, "loss": 1.5}, SCORED)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row | {"split": "train"}) for row in ROWS) + "\n")
    done = polyrex_fit(served, rows)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["task"]["name"] == "fitted"
    again = polyrex_fit(served, rows)
    assert again.exit_code == 1
    assert "task_exists" in again.output
    assert again.stderr.startswith("failed: task fitted")
    rows.write_text("no row\n")
    assert "rows.jsonl:1: not a row" in polyrex_fit(served, rows).output


def test_redirected_command_prints_a_line_for_each_event_and_a_summary(
    served: Served, play: Play, tmp_path: Path
) -> None:
    play({"event": "progress", "step": 1, "steps": 2, "loss": 1.5}, SCORED)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    done = polyrex_fit(served, rows)
    scores = "rank_classification_accuracy 0.5 on 2 rows held out, base model 0.25"
    *lines, last = done.stderr.splitlines()
    assert lines == ["step 1 of 2: loss 1.500", f"scored: {scores}"]
    assert last.startswith("registered: task fitted, version 1")


def test_command_says_why_a_task_is_refused(served: Served, play: Play, tmp_path: Path) -> None:
    play(SCORED | {"adapted": 0.25})
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    done = polyrex_fit(served, rows)
    assert done.exit_code == 1
    assert "refused: the fitted task does no better" in done.stderr
    assert json.loads(done.stdout)["event"] == "refused"
