"""JSON bodies: what reading them costs is bounded, and large ones leave the event loop."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator, TypeAdapter, ValidationError

from polyrex.server.errors import InvalidRequest, Overloaded
from polyrex.server.http.json_body import (
    MAX_KEYS,
    MAX_STRUCTURE,
    MOST_LARGE,
    BodyReader,
    parse,
    read,
)
from polyrex.server.requests.bodies import (
    ChatCompletionRequest,
    CompletionRequest,
    FitRequest,
)
from support.fake_server import Served
from support.requests.worst_bodies import MEGABYTE, WORST

LARGE = b'"' + b"x" * 100_000 + b'"'
SMALL = b'"x"'


def in_reader(call: Callable[[BodyReader], Any]) -> Any:
    """Await what the call makes of a reader, and close that."""

    async def run() -> Any:
        reader = BodyReader()
        try:
            return await call(reader)
        finally:
            await asyncio.to_thread(reader.close)

    return asyncio.run(run())


@pytest.mark.parametrize("name", WORST)
def test_the_worst_bodies_end_at_their_first_error(name: str) -> None:
    kind, body = WORST[name]
    with pytest.raises(InvalidRequest) as refused:
        read(kind, body)
    assert len(str(refused.value)) <= 300
    assert len(refused.value.param or "") <= 80


@pytest.mark.parametrize("name", WORST)
def test_the_errors_of_the_worst_bodies_are_few(name: str) -> None:
    kind, body = WORST[name]
    errors = 0
    try:
        value = parse(body)
    except InvalidRequest:
        value = {}
    try:
        kind.validate_python(value)
    except ValidationError as error:
        errors = error.error_count()
    assert 1 <= errors <= 10


@pytest.mark.parametrize(
    ("body", "key"),
    [
        (b'{"prompt": "a", "prompt": "b"}', "prompt"),
        (b'{"prompt": "a", "\\u0070rompt": "b"}', "prompt"),
        (b'{"a": [{"b": {"c": 1, "d": 2, "c": 1}}]}', "c"),
    ],
)
def test_a_key_that_comes_twice_is_named(body: bytes, key: str) -> None:
    with pytest.raises(InvalidRequest, match="comes twice") as refused:
        parse(body)
    assert refused.value.param == key


def test_a_long_key_that_comes_twice_is_named_shortly() -> None:
    key = b'"' + b"k" * 100_000 + b'": 1'
    with pytest.raises(InvalidRequest) as refused:
        parse(b"{" + key + b"," + key + b"}")
    assert len(str(refused.value)) <= 300
    assert refused.value.param == "k" * 80


@pytest.mark.parametrize("count", [MAX_KEYS, MAX_KEYS + 1])
def test_the_keys_of_an_object_are_bounded(count: int) -> None:
    body = json.dumps({str(number): number for number in range(count)}).encode()
    if count > MAX_KEYS:
        with pytest.raises(InvalidRequest, match=f"more than {MAX_KEYS} keys"):
            parse(body)
    else:
        assert len(parse(body)) == count


@pytest.mark.parametrize("item", ["[]", "{}", '[{"a":1}]', '{"a":[]}'])
@pytest.mark.parametrize("more", [False, True])
def test_the_lists_objects_and_keys_of_a_body_are_bounded(item: str, more: bool) -> None:
    marks = sum(item.count(mark) for mark in "[{:")
    count = (MAX_STRUCTURE - 1) // marks
    body = ("[" + ",".join([item] * (count + more)) + "]").encode()
    if more and count * marks + marks + 1 > MAX_STRUCTURE:
        with pytest.raises(InvalidRequest, match=f"more than {MAX_STRUCTURE} lists"):
            parse(body)
    else:
        assert len(parse(body)) == count


@settings(deadline=None)
@given(st.lists(st.sampled_from(["[", "{:", '"', "\\", "a", "\\[", '\\"', "\u1234"]), max_size=30))
def test_what_stands_in_texts_does_not_count(marks: list[str]) -> None:
    value = ["".join(marks) * 20_000, *marks]
    assert parse(json.dumps(value).encode()) == value
    assert parse(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"[" * 10_000, "nested too deeply"),
        (b'{"a":' * 10_000, "nested too deeply"),
        (b"9" * 5000, "too many digits"),
        (b"NaN", "NaN is no JSON number"),
        (b"[-Infinity]", "-Infinity is no JSON number"),
        (b"\xff", "not UTF-8"),
        (b'{"a": 1,}', "line 1, column 9"),
        (b'{"a": "\n"}', "control character"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    ],
)
def test_what_is_no_json_says_what_is_wrong(body: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        parse(body)


def test_what_a_body_may_have_is_read() -> None:
    chat = {"messages": [{"role": "user", "content": "a, b"}] * 1024, "temperature": 0}
    body = read(TypeAdapter(ChatCompletionRequest), json.dumps(chat).encode())
    assert len(body.messages) == 1024

    ids = {"prompt": [[5] * 2000] * 32}
    prompts = read(TypeAdapter(CompletionRequest), json.dumps(ids).encode()).prompts
    assert prompts == [[5] * 2000] * 32

    row = {"input": "i", "answer": "a", "options": [*"abcdefgh"]}
    fit = {"instruction": "Do.", "rows": [row] * 1024}
    assert len(read(TypeAdapter(FitRequest), json.dumps(fit).encode()).rows) == 1024


@pytest.mark.parametrize(("body", "apart"), [(SMALL, False), (LARGE, True)])
def test_a_large_body_is_read_off_the_event_loop(body: bytes, apart: bool) -> None:
    readers: list[int] = []

    def note(text: str) -> str:
        readers.append(threading.get_ident())
        return text

    kind = TypeAdapter(Annotated[str, AfterValidator(note)])
    assert in_reader(lambda reader: reader.read(kind, body)) == json.loads(body)
    assert [one != threading.get_ident() for one in readers] == [apart]


def test_large_bodies_beyond_a_bound_are_refused() -> None:
    may_go_on = threading.Event()

    def wait(text: str) -> str:
        may_go_on.wait(30)
        return text

    kind = TypeAdapter(Annotated[str, AfterValidator(wait)])

    async def too_many(reader: BodyReader) -> list[str]:
        waiting = [asyncio.create_task(reader.read(kind, LARGE)) for _ in range(MOST_LARGE)]
        await asyncio.sleep(0)
        try:
            with pytest.raises(Overloaded):
                await asyncio.wait_for(reader.read(kind, LARGE), 10)
            assert await reader.read(TypeAdapter(str), SMALL) == "x"
        finally:
            may_go_on.set()
        return await asyncio.gather(*waiting)

    assert len(in_reader(too_many)) == MOST_LARGE


def test_a_client_that_leaves_takes_its_waiting_body_along() -> None:
    begun, may_go_on = threading.Event(), threading.Event()
    read_bodies: list[str] = []

    def wait(text: str) -> str:
        begun.set()
        may_go_on.wait(30)
        read_bodies.append(text[:1])
        return text

    kind = TypeAdapter(Annotated[str, AfterValidator(wait)])

    async def leave(reader: BodyReader) -> None:
        first = asyncio.create_task(reader.read(kind, LARGE))
        second = asyncio.create_task(reader.read(kind, LARGE.replace(b"x", b"y")))
        await asyncio.to_thread(begun.wait, 30)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        may_go_on.set()
        await first

    in_reader(leave)
    assert read_bodies == ["x"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/completions", {"prompt": "x"}),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("POST", "/v1/tasks/t/fit", {"instruction": "x", "rows": []}),
        ("POST", "/v1/tasks", {"name": "t", "router": ""}),
        ("PUT", "/v1/tasks/t/labels", {"a": "b"}),
        ("PUT", "/v1/tasks/t/canary", {"version": 1, "share": 0.5}),
        ("POST", "/v1/tenants", {"name": "t"}),
    ],
)
def test_a_body_that_is_not_declared_as_json_is_415(
    served: Served, method: str, path: str, body: Any
) -> None:
    content = json.dumps(body).encode()
    for declared in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        None,
    ):
        headers = {} if declared is None else {"content-type": declared}
        response = served.client.request(method, path, content=content, headers=headers)
        assert response.status_code == 415
        assert response.json()["error"]["code"] == "unsupported_media_type"
    assert served.engine.requests == []


@pytest.mark.parametrize("declared", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_may_be_declared_with_parameters(served: Served, declared: str) -> None:
    response = served.client.post(
        "/v1/completions",
        content=b'{"prompt": "x", "max_tokens": 1}',
        headers={"content-type": declared},
    )
    assert response.status_code == 200


def test_the_document_still_describes_the_bodies(served: Served) -> None:
    document = served.client.get("/openapi.json").json()
    described = document["paths"]["/v1/completions"]["post"]["requestBody"]
    schema = described["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/CompletionRequest"}
    assert described["required"] is True
    assert "prompt" in document["components"]["schemas"]["CompletionRequest"]["properties"]


def test_a_megabyte_is_about_a_megabyte() -> None:
    assert all(0.5 * MEGABYTE < len(body) <= MEGABYTE for _, body in WORST.values())
