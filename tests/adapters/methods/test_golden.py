"""Every method against inputs and outputs of the papers' released code.

`--golden-dir DIR` checks any other folder of such files; tests/golden/README.md describes them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from polyrex.adapters.methods.protocol import Experts
from polyrex.adapters.methods.registry import make_experts
from polyrex.adapters.methods.tensorpoly_x import TensorPolyXExperts
from polyrex.adapters.methods.trex import SIGMOID_SCALE, TASK_COEFFICIENT, TOKEN_COEFFICIENT
from polyrex.adapters.spec import AdapterSpec, TargetModule
from polyrex.kernels.routing import StepRouting
from support.cases import relative_rms

TOLERANCE = 1e-5
Tensors = dict[str, Tensor]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        folder: Path = metafunc.config.getoption("golden_dir")
        files = sorted(folder.glob("*.safetensors"))
        assert files, f"{folder} has no golden files"
        metafunc.parametrize("golden_file", files, ids=lambda path: path.stem)


@pytest.mark.parametrize("composed", [False, True], ids=["shared", "composed"])
def test_delta_is_that_of_the_released_code(golden_file: Path, composed: bool) -> None:
    meta, tensors = read(golden_file)
    delta = delta_of(meta, tensors, composed=composed)
    assert relative_rms(delta, tensors["delta_y"]) <= TOLERANCE
    base = F.linear(tensors["x"], tensors["base_weight"], tensors["base_bias"])
    assert relative_rms(base + delta, tensors["y"]) <= TOLERANCE


def test_tolerance_tells_the_samples_apart(golden_file: Path) -> None:
    meta, tensors = read(golden_file)
    tensors["x"] = tensors["x"].roll(1, 0)
    assert relative_rms(delta_of(meta, tensors), tensors["delta_y"]) > 100 * TOLERANCE


def test_unknown_family_is_an_error(golden_file: Path) -> None:
    meta, tensors = read(golden_file)
    with pytest.raises(ValueError, match="no method for golden family 'quantum-lora'"):
        delta_of(meta | {"family": "quantum-lora"}, tensors)


def read(path: Path) -> tuple[dict[str, Any], Tensors]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["meta"]), load_file(path)


def delta_of(meta: dict[str, Any], tensors: Tensors, *, composed: bool = False) -> Tensor:
    """Our delta for the file's inputs: [batch, tokens, d_out].

    `composed` lets a method compose a sample's weights once, where it can.
    """
    family = meta["family"]
    target = TargetModule("layer", meta["in_features"], meta["out_features"])
    if family in ("poly", "mhr") or re.fullmatch(r"tensorpoly[12x]_order\d", family):
        experts = poly_experts(meta, tensors, target)
        logits = tensors["module_logits"][tensors["task_ids"]]
    elif family in ("trex_rank1", "trex_rank1flex"):
        experts = trex_experts(meta, tensors, target)
        logits = tensors["relate_score"]
    elif family in ("molora", "sira"):
        experts = token_routed_experts(meta, tensors, target)
        logits = torch.empty(len(tensors["x"]), 0)
    else:
        raise ValueError(f"no method for golden family {family!r}")
    x = tensors["x"]
    weights = experts.route(experts.spec, logits)
    rows = torch.arange(len(x)).repeat_interleave(x.shape[1])
    routing = StepRouting(weights.unsqueeze(1), rows, x.dtype).module(0)
    with torch.no_grad():
        operands = experts.operands(x.dtype)
        if composed and not experts.routes_by_token:
            delta = experts.compose(operands, weights, x.dtype).delta(x)
            return delta[..., : target.d_out]
        delta = experts.delta(operands, x.flatten(0, 1), routing)
    return delta.view(*x.shape[:2], -1)


def poly_experts(meta: dict[str, Any], tensors: Tensors, target: TargetModule) -> Experts:
    family, rank, experts = meta["family"], meta["lora_rank"], meta["n_skills"]
    parameters = {
        name.removeprefix("param."): tensor
        for name, tensor in tensors.items()
        if name.startswith("param.")
    }
    if family in ("poly", "mhr"):
        splits = {"splits": meta["n_splits"]} if family == "mhr" else {}
        spec = AdapterSpec(family, rank=rank, experts=experts, **splits)
        return load(make_experts(spec, target), parameters)
    order = int(family[-1])
    method = f"tensorpoly-{family[len('tensorpoly')]}"
    made = make_experts(AdapterSpec(method, rank=rank, experts=experts, order=order), target)
    if isinstance(made, TensorPolyXExperts):
        made.load_released([parameters[f"tensor_weights.{i}"] for i in range(len(parameters))])
        parameters = dict(made.tensor_weights.named_parameters(prefix="tensor_weights"))
    return load(made, parameters | {"gate": torch.ones(())})


def trex_experts(meta: dict[str, Any], tensors: Tensors, target: TargetModule) -> Experts:
    constants = meta["token_coefficient"], meta["task_coefficient"], meta["sigmoid_scale"]
    assert constants == (TOKEN_COEFFICIENT, TASK_COEFFICIENT, SIGMOID_SCALE)
    form = {"rank1": "diagonal", "rank1_flex": "mix"}[meta["mode"]]
    spec = AdapterSpec("trex", rank=meta["r1"], rank_out=meta["r2"], form=form)  # type: ignore[arg-type]
    parameters = low_rank_parameters(tensors)
    for name in ("omega_raw", "gate_raw"):
        parameters[name] = tensors[name].squeeze()
    return load(make_experts(spec, target), parameters)


def token_routed_experts(meta: dict[str, Any], tensors: Tensors, target: TargetModule) -> Experts:
    family, experts = meta["family"], meta["experts"]
    top_k = {"top_k": meta["sira_topk"]} if family == "sira" else {}
    spec = AdapterSpec(family, rank=meta["r1"] // experts, experts=experts, **top_k)
    return load(make_experts(spec, target), low_rank_parameters(tensors))


def low_rank_parameters(tensors: Tensors) -> Tensors:
    return {
        "lora_a": tensors["lora_A"],
        "lora_b": tensors["lora_B"],
        "token_router": tensors["router"],
    }


def load(experts: Experts, parameters: Tensors) -> Experts:
    experts.load_state_dict(parameters)
    return experts
