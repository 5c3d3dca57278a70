"""The adapter methods: name -> class. A new method is one file here and one row below."""

from __future__ import annotations

import difflib
from types import MappingProxyType

from torch import Tensor

from polyrex.adapters.errors import UnknownMethod
from polyrex.adapters.spec import AdapterSpec, TargetModule, routing_groups

from .low_rank import LoraExperts, MhrExperts, PolyExperts
from .molora import MoloraExperts, SiraExperts
from .protocol import Experts
from .tensorpoly_1 import TensorPoly1Experts
from .tensorpoly_2 import TensorPoly2Experts
from .tensorpoly_x import TensorPolyXExperts
from .tlora import TLoraExperts
from .trex import TrexExperts

METHODS: MappingProxyType[str, type[Experts]] = MappingProxyType(
    {
        cls.method: cls
        for cls in (
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
    }
)


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
    return weights[..., routing_groups(targets, spec.granularity), :]
