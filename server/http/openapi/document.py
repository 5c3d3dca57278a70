"""The OpenAPI document: FastAPI's, with what every route really takes and answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from polyrex.server.http.access import ACCESS
from polyrex.server.http.error_handlers import answer_to

from . import shapes
from .answers import (
    EVENTS,
    FIRST,
    GUARD,
    HEADERS,
    NO_TYPE,
    PARAMETERS,
    REQUEST_ID,
    ROUTES,
    Answers,
    Errors,
    Success,
)

Json = dict[str, Any]

_PARAMETERS: dict[str, Json] = {
    name: {
        "name": name,
        "in": "header",
        "required": False,
        "description": description,
        "schema": {"type": "string", "pattern": f"^({pattern})$"},
    }
    for name, (pattern, description) in PARAMETERS.items()
}
_TEXT: Json = {"schema": {"type": "string"}}
_EVENT: Json = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}},
}
_COMPONENT = "#/components/schemas/{model}"
_KEY = "bearer"


def describe(app: FastAPI, *, keys: bool) -> None:
    """Let the application show this document as its own; `keys`: it asks for API keys."""
    made = cache(partial(openapi_document, app, keys=keys))  # when it is first asked for
    app.openapi = made  # type: ignore[method-assign]


def openapi_document(app: FastAPI, *, keys: bool) -> Json:
    """Make the document. Raises KeyError where answers.py does not know a route."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas: Json = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):  # errors have another shape here
        schemas.pop(name, None)
    refusals: Json = {}
    for method, path, operation in _operations(document):
        open_to_all = ACCESS[method, path].open
        answers = ROUTES[method, path]
        if not open_to_all:
            operation["security"] = [{_KEY: []}] if keys else [{_KEY: []}, {}]
        before = FIRST if open_to_all else FIRST + GUARD
        operation["responses"] = _responses(answers, before, refusals)
        everywhere = [{"$ref": f"#/components/parameters/{name}"} for name in _PARAMETERS]
        operation["parameters"] = [*operation.get("parameters", ()), *everywhere]
        if method == "POST":  # which has to be declared as JSON, also where nothing reads the body
            body = operation.setdefault("requestBody", {"content": {"application/json": {}}})
            body["required"] = True
        _accept_null(operation.get("requestBody", {}))
    _accept_null(schemas)
    _, shown = models_json_schema(
        [(shape, "serialization") for shape in _shapes()], ref_template=_COMPONENT
    )
    schemas |= shown["$defs"]
    document["components"]["parameters"] = _PARAMETERS
    document["components"]["responses"] = refusals
    document["components"]["securitySchemes"] = {_KEY: {"type": "http", "scheme": "bearer"}}
    return document


def _operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield method.upper(), path, operation


def _shapes() -> list[type[shapes.Shape]]:
    bodies = {
        success.body: None
        for answers in ROUTES.values()
        for success in answers.success.values()
        if not isinstance(success.body, str)
    }
    return [*bodies, shapes.Error]


def _responses(answers: Answers, before: Errors, refusals: Json) -> Json:
    """The answers of a route; those that are errors are put into `refusals`, each once."""
    found = {str(status): _success(success) for status, success in answers.success.items()}
    errors: dict[int, Errors] = {}
    for error in (*before, *answers.errors):
        status = answer_to(error).status
        errors[status] = (*errors.get(status, ()), error)
    for status, these in sorted(errors.items()):
        name = "-".join([str(status), *dict.fromkeys(answer_to(error).code for error in these)])
        refusals[name] = _refusal(these)
        found[str(status)] = {"$ref": f"#/components/responses/{name}"}
    return found


def _success(success: Success) -> Json:
    content: Json = {}
    if not isinstance(success.body, str):
        content["application/json"] = {"schema": _reference(success.body)}
    elif success.body not in (NO_TYPE, EVENTS):
        content[success.body] = _TEXT
    if success.streams or success.body == EVENTS:
        content[EVENTS] = {"itemSchema": _EVENT}
    headers = dict.fromkeys((*success.headers, REQUEST_ID), True)
    headers |= dict.fromkeys(success.may_have, False)
    return {"description": success.description, "content": content, "headers": _headers(headers)}


def _refusal(errors: Errors) -> Json:
    """The answer to any of some errors, which have one status."""
    answers = [answer_to(error) for error in errors]
    lines = [
        f"`{answer.code}`: {(error.__doc__ or '').splitlines()[0]}"
        for answer, error in zip(answers, errors, strict=True)
    ]
    named = {name for answer in answers for name in answer.headers if name in HEADERS}
    required = {name: all(name in answer.headers for answer in answers) for name in sorted(named)}
    content = {"application/json": {"schema": _reference(shapes.Error)}}
    return {
        "description": "\n\n".join(lines),
        "content": content,
        "headers": _headers(required | {REQUEST_ID: True}),
    }


def _headers(required: Mapping[str, bool]) -> Json:
    return {
        name: {"description": HEADERS[name], "required": needed, "schema": {"type": "string"}}
        for name, needed in required.items()
    }


def _reference(shape: type[shapes.Shape]) -> Json:
    return {"$ref": _COMPONENT.format(model=shape.__name__)}


def _accept_null(schema: Any) -> None:
    """A field that a request need not have may be null: that counts as not given."""
    if isinstance(schema, list):
        for each in schema:
            _accept_null(each)
    if not isinstance(schema, dict):
        return
    if schema.get("additionalProperties") is False:
        for name in schema.get("properties", {}).keys() - set(schema.get("required", ())):
            schema["properties"][name] = _or_null(schema["properties"][name])
    for each in schema.values():
        _accept_null(each)


def _or_null(schema: Json) -> Json:
    kinds = schema.get("anyOf")
    if kinds is None:
        return {"anyOf": [schema, {"type": "null"}]}
    return schema if {"type": "null"} in kinds else schema | {"anyOf": [*kinds, {"type": "null"}]}
