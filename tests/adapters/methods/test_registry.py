"""A method says all that the protocol asks for, or it is not registered."""

from __future__ import annotations

from typing import Any

import pytest

from polyrex.adapters.errors import SpecError, UnknownMethod
from polyrex.adapters.methods.lora_poly_mhr import PolyExperts
from polyrex.adapters.methods.protocol import Experts
from polyrex.adapters.methods.registry import METHODS, method_class, registered
from polyrex.adapters.spec import AdapterSpec


def method(**changes: Any) -> type[Experts]:
    """A method like poly, of another name."""
    declared = {"method": "other", "examples": (AdapterSpec("other", rank=2, experts=3),)}
    return type("OtherExperts", (PolyExperts,), declared | changes)


def without(name: str) -> type[Experts]:
    cls = method()
    delattr(cls, name)
    return cls


def test_a_method_that_says_everything_is_registered() -> None:
    assert registered(PolyExperts, method()).keys() == {"poly", "other"}


@pytest.mark.parametrize("name", ["method", "examples"])
def test_a_method_must_declare_its_own(name: str) -> None:
    with pytest.raises(SpecError, match=f"OtherExperts does not declare `{name}`"):
        registered(without(name))


@pytest.mark.parametrize("name", ["method", "uses", "rates", "roles", "no_lora", "examples"])
def test_every_declaration_is_asked_for(name: str) -> None:
    class Bare(Experts):
        pass

    for other in {"method", "uses", "rates", "roles", "no_lora", "examples"} - {name}:
        setattr(Bare, other, getattr(PolyExperts, other))
    with pytest.raises(SpecError, match=f"Bare does not declare `{name}`"):
        registered(Bare)  # type: ignore[type-abstract]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"uses": frozenset({"rnak"})}, r"names no field of AdapterSpec: \['rnak'\]"),
        ({"examples": ()}, "`examples` is empty"),
        ({"examples": (AdapterSpec("poly"),)}, "an example is of poly"),
        ({"examples": (AdapterSpec("other", splits=2),)}, "other has no splits"),
        ({"roles": {"lora_a": "experts"}}, r"must name the parameters \['lora_a', 'lora_b'\]"),
    ],
)
def test_a_declaration_that_is_wrong_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        registered(method(**changes))


def test_two_methods_of_one_name_are_an_error() -> None:
    with pytest.raises(SpecError, match="two adapter methods are named other"):
        registered(method(), method())


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UnknownMethod, match="did you mean tensorpoly-1"):
        method_class("tensorpoly1")
    assert method_class("sira") is METHODS["sira"]
