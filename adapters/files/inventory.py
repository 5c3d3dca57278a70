"""The inventory: the tensors of all experts of one base model; one immutable safetensors file.

Tensors are named `<module>.<parameter>`. The metadata, all strings:

| key | value |
|---|---|
| format, format_version | `polyrex.inventory`, `1` |
| method | the method's name |
| hyperparameters | AdapterSpec as JSON |
| base | BaseIdentity as JSON |
| targets | JSON list of [module, d_in, d_out] |
| encoder | EncoderIdentity as JSON, where T-REX has an intuition |
| weights | the fingerprint of the base model's weights, where known (model/fingerprint.py) |

Files from before there were fingerprints lack the last one. `fingerprint.json` beside them may have
it: a JSON object of fingerprints by the sha256 of inventories.

With an intuition there are two more tensors, `intuition.centroids` and `intuition.map`.

The sha256 of the file is its id; routers name it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyrex.adapters.errors import BaseModelMismatch, FileError, MalformedFile, SpecError
from polyrex.adapters.methods.protocol import Experts
from polyrex.adapters.methods.registry import make_experts, method_class, route, routing_shape
from polyrex.adapters.model.attach import AdaptedModel, attach
from polyrex.adapters.model.base_model import BaseIdentity, identify
from polyrex.adapters.model.fingerprint import FINGERPRINT
from polyrex.adapters.model.intuition import EncoderIdentity, Intuition
from polyrex.adapters.spec import AdapterSpec, TargetModule

from .tensor_file import (
    STORED_DTYPES,
    Shape,
    TensorFile,
    cast_finite,
    parse,
    serialise,
    sha256,
    strict_json,
    write_atomic,
)

FORMAT = "polyrex.inventory"
FINGERPRINTS = "fingerprint.json"
_HEADER_LIMIT = 32 << 20  # bytes; 432 modules with 3 tensors each take a quarter of a megabyte


@dataclass(frozen=True)
class Inventory:
    """An inventory without its experts' tensors: enough to check and route tasks."""

    path: Path
    sha256: str
    spec: AdapterSpec
    targets: tuple[TargetModule, ...]
    base: BaseIdentity
    intuition: Intuition | None = None

    @cached_property
    def routing_shape(self) -> tuple[int, int]:
        """Shape of a router's tensor: (groups, R)."""
        return routing_shape(self.spec, self.targets)

    @cached_property
    def hyperparameters(self) -> str:
        """The spec as JSON, as it stands in the metadata of routers."""
        return self.spec.to_json()

    @property
    def table_shape(self) -> tuple[int, int]:
        """Shape of a row of the routing table: (M, W)."""
        return len(self.targets), method_class(self.spec.method).table_size(self.spec)

    def route(self, logits: Tensor) -> Tensor:
        """The row of the routing table, [M, W], of a router's logits [groups, R]."""
        if self.intuition is not None:
            logits = self.intuition.gates(logits)
        return route(self.spec, self.targets, logits)


def write_inventory(
    path: Path, adapted: AdaptedModel, *, dtype: torch.dtype = torch.float32
) -> str:
    """Write the experts of an adapted model, atomically; returns the file's sha256.

    Experts that come from an inventory stay with the base model that it names: it is not known
    whether one without a fingerprint was made for these weights. Raises TensorMismatch where a
    value is not finite in `dtype`.
    """
    base = adapted.made_for or identify(adapted.model)
    tensors = {
        name: cast_finite(parameter.detach().cpu(), dtype, f"{path}: tensor {name}")
        for name, parameter in _tensors(adapted).items()
    }
    metadata = {
        "format": FORMAT,
        "format_version": "1",
        "method": adapted.spec.method,
        "hyperparameters": adapted.spec.to_json(),
        "base": json.dumps(base.configuration(), sort_keys=True),
        "targets": json.dumps([[t.name, t.d_in, t.d_out] for t in adapted.targets]),
    }
    if base.weights is not None:
        metadata["weights"] = base.weights
    if adapted.intuition is not None:
        metadata["encoder"] = json.dumps(asdict(adapted.intuition.encoder), sort_keys=True)
    data = serialise(tensors, metadata)
    write_atomic(path, data)
    return sha256(data)


def write_fingerprint(inventory: Inventory, weights: str) -> None:
    """Note beside an inventory's file for which weights it was made, as the file itself does not.

    Raises MalformedFile where there are notes that cannot be read.
    """
    path = inventory.path.with_name(FINGERPRINTS)
    noted = {**_noted_weights(path), inventory.sha256: weights}
    write_atomic(path, (json.dumps(noted, indent=2, sort_keys=True) + "\n").encode())


def read_inventory(path: Path) -> Inventory:
    """Read an inventory's header and hash its bytes; `load_experts` reads its tensors.

    Raises MalformedFile where the file is truncated, of another format or version, of an unknown
    method, or without its metadata; FileError where it cannot be read at all.
    """
    return _read(path)[0]


def load_experts(inventory: Inventory, model: nn.Module) -> AdaptedModel:
    """Attach an inventory to the base model that it was made for.

    Every check comes before the model is touched. Raises BaseModelMismatch where the model is
    another one, or has other weights, and what `read_experts` raises.
    """
    inventory.base.check(identify(model), str(inventory.path))
    experts = read_experts(inventory)
    try:
        adapted = attach(model, inventory.spec, inventory.targets, intuition=inventory.intuition)
    except SpecError as error:
        raise BaseModelMismatch(f"{inventory.path}: {error}") from error
    for layer, found in zip(adapted.layers, experts, strict=True):
        layer.experts = found.to(layer.base.weight.device)
    adapted.made_for = inventory.base
    return adapted


def read_experts(inventory: Inventory) -> tuple[Experts, ...]:
    """The experts of every target module, in the inventory's order, in float32 on the CPU.

    Raises TensorMismatch naming the tensor that is not as it should be, MalformedFile where the
    file is not the one whose header was read.
    """
    found, file = _read(inventory.path)
    if found.sha256 != inventory.sha256:
        raise MalformedFile(f"{inventory.path}: the file has changed since it was first read")
    tensors = file.checked(
        expected_tensors(inventory.spec, inventory.targets), tuple(STORED_DTYPES)
    )
    experts = tuple(make_experts(inventory.spec, target) for target in inventory.targets)
    with torch.no_grad():
        for each in experts:
            for name, parameter in each.named_parameters():
                parameter.copy_(tensors[f"{each.target.name}.{name}"])
    return experts


def expected_tensors(spec: AdapterSpec, targets: tuple[TargetModule, ...]) -> dict[str, Shape]:
    """Name and shape of every tensor that an inventory of this spec and targets holds."""
    with torch.device("meta"):
        return {
            f"{target.name}.{name}": tuple(parameter.shape)
            for target in targets
            for name, parameter in make_experts(spec, target).named_parameters()
        }


def _tensors(adapted: AdaptedModel) -> Mapping[str, Tensor]:
    tensors: dict[str, Tensor] = {
        f"{target.name}.{name}": parameter
        for target, layer in zip(adapted.targets, adapted.layers, strict=True)
        for name, parameter in layer.experts.named_parameters()
    }
    if adapted.intuition is not None:
        tensors |= {f"intuition.{k}": v for k, v in adapted.intuition.state_dict().items()}
    return tensors


def _intuition(spec: AdapterSpec, file: TensorFile) -> Intuition | None:
    if spec.intuition is None:
        return None
    encoder = EncoderIdentity(**file.json_object("encoder"))
    gates, centroids = spec.gates, spec.intuition
    shapes = {"centroids": (centroids, encoder.dimension), "map": (gates, centroids)}
    own = {f"intuition.{name}": shape for name, shape in shapes.items()}
    here = file.only(own.keys())
    found = here.checked(own, tuple(STORED_DTYPES))
    intuition = Intuition(found["intuition.centroids"], encoder, gates)
    with torch.no_grad():
        intuition.map.copy_(found["intuition.map"])
    return intuition.requires_grad_(False)


def _weights(path: Path, file: TensorFile, own_sha256: str) -> str | None:
    """The fingerprint in an inventory's metadata, or else the one that is noted beside it."""
    if "weights" in file.metadata:
        found: Any = file.text("weights")
    else:
        found = _noted_weights(path.with_name(FINGERPRINTS)).get(own_sha256)
    if found is not None and not (isinstance(found, str) and FINGERPRINT.fullmatch(found)):
        raise MalformedFile(f"{path}: no fingerprint of weights: {found!r:.80}")
    return found


def _noted_weights(path: Path) -> dict[str, Any]:
    try:
        found = strict_json(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise MalformedFile(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise MalformedFile(f"{path}: must hold a JSON object")
    return found


def _read(path: Path) -> tuple[Inventory, TensorFile]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    file = parse(data, str(path), FORMAT, _HEADER_LIMIT)
    try:
        spec = AdapterSpec.from_json(file.text("hyperparameters"))
        method_class(spec.method).check(spec)
        if spec.method != file.text("method"):
            raise MalformedFile(f"{path}: method and hyperparameters contradict each other")
        targets = tuple(TargetModule(*fields) for fields in file.json("targets"))
        base = BaseIdentity(**file.json_object("base"))
        base = replace(base, weights=_weights(path, file, sha256(data)))
    except (SpecError, TypeError) as error:
        raise MalformedFile(f"{path}: {error}") from error
    if not targets:
        raise MalformedFile(f"{path}: it names no target modules")
    intuition = _intuition(spec, file)
    if intuition is not None:
        names = [name for name in file.tensors if not name.startswith("intuition.")]
        file = file.only(names)
    return Inventory(path, sha256(data), spec, targets, base, intuition), file
