"""The adapter methods: name -> class. A new method is one file here and one row below."""

from __future__ import annotations

import difflib
from dataclasses import fields
from types import MappingProxyType

import torch
from torch import Tensor

from polyrex.adapters.errors import SpecError, UnknownMethod
from polyrex.adapters.spec import AdapterSpec, TargetModule, routing_groups

from .lora_poly_mhr import LoraExperts, MhrExperts, PolyExperts
from .molora_sira import MoloraExperts, SiraExperts
from .protocol import Experts
from .tensorpoly_1 import TensorPoly1Experts
from .tensorpoly_2 import TensorPoly2Experts
from .tensorpoly_x import TensorPolyXExperts
from .tlora import TLoraExperts
from .trex import TrexExperts

_DECLARED = ("method", "uses", "rates", "roles", "no_lora", "examples")
_OWN = ("method", "examples")
"""Declarations that a method cannot take over from the method that it derives from."""


def registered(*classes: type[Experts]) -> MappingProxyType[str, type[Experts]]:
    """Methods by name; raises SpecError where one does not say all that the protocol asks for."""
    found: dict[str, type[Experts]] = {}
    for cls in classes:
        _check_declarations(cls)
        if cls.method in found:
            raise SpecError(f"two adapter methods are named {cls.method}")
        found[cls.method] = cls
    return MappingProxyType(found)


def _check_declarations(cls: type[Experts]) -> None:
    for name in _DECLARED:
        if not hasattr(cls, name) or (name in _OWN and name not in vars(cls)):
            raise SpecError(f"adapter method {cls.__name__} does not declare `{name}`")
    unknown = cls.uses - {field.name for field in fields(AdapterSpec)}
    if unknown:
        raise SpecError(f"{cls.method}: `uses` names no field of AdapterSpec: {sorted(unknown)}")
    if not cls.examples:
        raise SpecError(f"{cls.method}: `examples` is empty")
    parameters: set[str] = set()
    for spec in cls.examples:
        if spec.method != cls.method:
            raise SpecError(f"{cls.method}: an example is of {spec.method}")
        cls.check(spec)
        with torch.device("meta"):
            experts = cls(spec, TargetModule("example", 60, 60))
        parameters |= {name.partition(".")[0] for name, _ in experts.named_parameters()}
    if parameters != cls.roles.keys():
        raise SpecError(
            f"{cls.method}: `roles` must name the parameters {sorted(parameters)}, "
            f"got {sorted(cls.roles)}"
        )


METHODS = registered(
    LoraExperts,
    TLoraExperts,
    PolyExperts,
    MhrExperts,
    TensorPoly1Experts,
    TensorPoly2Experts,
    TensorPolyXExperts,
    TrexExperts,
    MoloraExperts,
    SiraExperts,
)
"""Every method, by its name: one row each."""


def method_class(name: str) -> type[Experts]:
    """The class of a method; raises UnknownMethod with the nearest names."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UnknownMethod(f"no adapter method {name!r}; there are {', '.join(METHODS)}{hint}")
    return METHODS[name]


def make_experts(spec: AdapterSpec, target: TargetModule) -> Experts:
    """Experts of one target module, parameters not yet drawn; raises SpecError on a bad spec."""
    cls = method_class(spec.method)
    cls.check(spec)
    return cls(spec, target)


def routing_shape(spec: AdapterSpec, targets: tuple[TargetModule, ...]) -> tuple[int, int]:
    """Shape of a router's tensor: (groups, R)."""
    groups = routing_groups(targets, spec.granularity)
    return int(groups.max()) + 1, method_class(spec.method).routing_size(spec)


def route(
    spec: AdapterSpec, targets: tuple[TargetModule, ...], logits: Tensor, *, sample: bool = False
) -> Tensor:
    """Rows of the routing table, [..., M, W], of router logits [..., groups, R]."""
    weights = method_class(spec.method).route(spec, logits, sample=sample)
    if spec.granularity == "module":  # every module has a row of its own already
        return weights
    groups = routing_groups(targets, spec.granularity)
    return weights.index_select(-2, groups.to(weights.device))
