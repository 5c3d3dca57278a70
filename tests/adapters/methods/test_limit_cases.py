"""Special cases in which one method must be another."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from polyrex.adapters.methods.protocol import Experts
from polyrex.adapters.methods.registry import make_experts
from polyrex.adapters.methods.tensorpoly_x import TensorPolyXExperts
from polyrex.adapters.spec import AdapterSpec, TargetModule
from polyrex.kernels.routing import StepRouting
from support.cases import relative_rms

TARGET = TargetModule("layer", 15, 21)
TOLERANCE = 1e-5
X = torch.randn(7, TARGET.d_in, generator=torch.Generator().manual_seed(1))


def random_experts(spec: AdapterSpec, target: TargetModule = TARGET) -> Experts:
    experts = make_experts(spec, target).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.normal_(generator=generator)
    return experts


def with_parameters(spec: AdapterSpec, **parameters: Tensor) -> Experts:
    experts = make_experts(spec, TARGET).requires_grad_(False)
    experts.load_state_dict(parameters)
    return experts


def delta(experts: Experts, logits: Tensor | None = None) -> Tensor:
    """For one task: logits [R], or none where the method has none."""
    if logits is None:
        logits = torch.empty(0)
    weights = experts.route(experts.spec, logits)[None]
    rows = torch.zeros(len(X), dtype=torch.int64)
    routing = StepRouting(weights.unsqueeze(1), rows, X.dtype).module(0)
    return experts.delta(experts.operands(X.dtype), X, routing)


def one_hot(chosen: int | list[int], experts: int) -> Tensor:
    """Logits that route wholly to one expert, or to one of each run of experts."""
    hot = torch.nn.functional.one_hot(torch.tensor(chosen), experts).float()
    return (hot * 2 - 1).flatten() * 60


def test_lora_is_its_formula() -> None:
    lora = random_experts(AdapterSpec("lora", rank=3, alpha=6.0))
    a, b = lora.get_parameter("lora_a")[0, 0], lora.get_parameter("lora_b")[0, 0]
    assert relative_rms(delta(lora), X @ a @ b * 6 / 3) <= TOLERANCE


def test_poly_of_one_expert_is_lora() -> None:
    poly = random_experts(AdapterSpec("poly", rank=3))
    lora = with_parameters(AdapterSpec("lora", rank=3), **poly.state_dict())
    assert relative_rms(delta(poly, torch.tensor([0.3])), delta(lora)) <= TOLERANCE


def test_mhr_of_one_split_is_poly() -> None:
    mhr = random_experts(AdapterSpec("mhr", rank=3, experts=4, splits=1))
    poly = with_parameters(AdapterSpec("poly", rank=3, experts=4), **mhr.state_dict())
    logits = torch.randn(4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(delta(mhr, logits), delta(poly, logits))


def test_poly_routed_to_one_expert_is_that_expert() -> None:
    poly = random_experts(AdapterSpec("poly", rank=3, experts=4))
    expert = {name: p[:, 2:3].clone() for name, p in poly.named_parameters()}
    lora = with_parameters(AdapterSpec("lora", rank=3), **expert)
    assert relative_rms(delta(poly, one_hot(2, 4)), delta(lora)) <= TOLERANCE


def test_mhr_routed_to_one_expert_a_split_is_lora_of_those_blocks() -> None:
    mhr = random_experts(AdapterSpec("mhr", rank=2, experts=4, splits=3))
    chosen = [3, 0, 2]
    a = torch.cat([mhr.get_parameter("lora_a")[s, e] for s, e in enumerate(chosen)])
    b = torch.cat([mhr.get_parameter("lora_b")[s, e] for s, e in enumerate(chosen)], 1)
    lora = with_parameters(AdapterSpec("lora", rank=2), lora_a=a[None, None], lora_b=b[None, None])
    assert relative_rms(delta(mhr, one_hot(chosen, 4)), delta(lora)) <= TOLERANCE


@pytest.mark.parametrize("order", [2, 4])
def test_tensorpoly_1_routed_to_one_expert_is_its_tlora(order: int) -> None:
    poly = random_experts(AdapterSpec("tensorpoly-1", rank=3, experts=4, order=order))
    expert = {n: p if n == "gate" else p[:, 2:3].clone() for n, p in poly.named_parameters()}
    tlora = with_parameters(AdapterSpec("tlora", rank=3, order=order), **expert)
    assert relative_rms(delta(poly, one_hot(2, 4)), delta(tlora)) <= TOLERANCE


@pytest.mark.parametrize("order", [2, 4])
def test_tensorpoly_2_routed_to_one_leaf_an_order_is_tlora_of_those(order: int) -> None:
    poly = random_experts(AdapterSpec("tensorpoly-2", rank=3, experts=4, order=order))
    chosen = [3, 0, 2, 1][:order]
    leaves = {
        name: parameter[range(order), chosen][:, None]
        for name, parameter in poly.named_parameters()
        if name != "gate"
    }
    spec = AdapterSpec("tlora", rank=3, order=order)
    tlora = with_parameters(spec, **leaves, gate=poly.get_parameter("gate"))
    assert relative_rms(delta(poly, one_hot(chosen, 4)), delta(tlora)) <= TOLERANCE


def test_tensorpoly_1_of_order_1_without_norm_is_poly() -> None:
    tensor = random_experts(AdapterSpec("tensorpoly-1", rank=3, experts=4, order=1, norm="none"))
    torch.nn.init.ones_(tensor.get_parameter("gate"))
    a, b = tensor.get_parameter("weight_leafs_a"), tensor.get_parameter("weight_leafs_b")
    poly = with_parameters(
        AdapterSpec("poly", rank=3, experts=4), lora_a=a.transpose(2, 3), lora_b=b
    )
    logits = torch.randn(4, generator=torch.Generator().manual_seed(2))
    assert relative_rms(delta(tensor, logits), delta(poly, logits)) <= TOLERANCE


def test_tensorpoly_2_of_order_1_without_norm_is_poly() -> None:
    tensor = random_experts(AdapterSpec("tensorpoly-2", rank=3, experts=4, order=1, norm="none"))
    torch.nn.init.ones_(tensor.get_parameter("gate"))
    a, b = tensor.get_parameter("weight_leafs_a"), tensor.get_parameter("weight_leafs_b")
    poly = with_parameters(
        AdapterSpec("poly", rank=3, experts=4), lora_a=a.transpose(2, 3), lora_b=b
    )
    logits = torch.randn(4, generator=torch.Generator().manual_seed(2))
    assert relative_rms(delta(tensor, logits), delta(poly, logits)) <= TOLERANCE


@pytest.mark.parametrize("target", [TargetModule("wide", 15, 40), TargetModule("narrow", 15, 8)])
def test_tensor_train_of_two_cores_is_its_contraction(target: TargetModule) -> None:
    train = random_experts(AdapterSpec("tensorpoly-x", rank=3, experts=5), target)
    assert isinstance(train, TensorPolyXExperts)
    first, last = train.tensor_weights
    logits = torch.randn(10, generator=torch.Generator().manual_seed(2))
    w = train.route(train.spec, logits).view(2, 5)
    matrix = torch.einsum("e,f,aebf,cfdm->acbdm", w[0], w[1], first, last).reshape(16, -1)
    expected = train.gate * X @ matrix[: target.d_in, : target.d_out] / 3
    assert relative_rms(delta(train, logits), expected) <= TOLERANCE


def test_tensor_train_of_three_cores_is_its_contraction() -> None:
    train = random_experts(AdapterSpec("tensorpoly-x", rank=3, experts=2, order=3))
    assert isinstance(train, TensorPolyXExperts)
    logits = torch.randn(6, generator=torch.Generator().manual_seed(2))
    w = train.route(train.spec, logits).view(3, 2)
    path = "e,f,g,aebf,cfdg,hgkm->achbdkm"
    matrix = torch.einsum(path, *w, *train.tensor_weights).reshape(27, -1)
    expected = train.gate * X @ matrix[: TARGET.d_in, : TARGET.d_out] / 3
    assert relative_rms(delta(train, logits), expected) <= TOLERANCE


def test_released_tensor_train_shares_one_tensor_among_its_first_cores() -> None:
    train = make_experts(AdapterSpec("tensorpoly-x", experts=2, order=3), TARGET)
    assert isinstance(train, TensorPolyXExperts)
    shared, last = torch.randn(3, 2, 3, 2), torch.randn(3, 2, 3, math.ceil(21 / 15))
    train.load_released([shared, last])
    assert torch.equal(train.tensor_weights[0], shared)
    assert torch.equal(train.tensor_weights[1], shared)
    assert torch.equal(train.tensor_weights[2], last)


def test_static_trex_with_diagonal_cores_is_lora() -> None:
    trex = random_experts(AdapterSpec("trex", rank=3, form="static"))
    diagonal = torch.tensor([0.5, -2.0, 1.5])
    a, b = trex.get_parameter("lora_a"), trex.get_parameter("lora_b")
    lora = with_parameters(
        AdapterSpec("lora", rank=3, alpha=3.0),
        lora_a=a.t()[None, None],
        lora_b=(b * diagonal).t()[None, None],
    )
    assert relative_rms(delta(trex, torch.diag(diagonal).flatten()), delta(lora)) <= TOLERANCE


def test_static_trex_is_its_formula() -> None:
    trex = random_experts(AdapterSpec("trex", rank=3, rank_out=5, form="static"))
    core = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    a, b = trex.get_parameter("lora_a"), trex.get_parameter("lora_b")
    assert relative_rms(delta(trex, core.flatten()), X @ a.t() @ core @ b.t()) <= TOLERANCE


def test_mixed_trex_whose_token_router_is_off_is_static_trex() -> None:
    mixed = random_experts(AdapterSpec("trex", rank=3, rank_out=5))
    torch.nn.init.constant_(mixed.get_parameter("omega_raw"), -1)  # omega = 0
    torch.nn.init.constant_(mixed.get_parameter("gate_raw"), 1)  # sigmoid = 1
    sides = {name: mixed.get_parameter(name) for name in ("lora_a", "lora_b")}
    static = with_parameters(AdapterSpec("trex", rank=3, rank_out=5, form="static"), **sides)
    intuition = torch.randn(15, generator=torch.Generator().manual_seed(2))
    assert relative_rms(delta(mixed, intuition), delta(static, 4 * intuition)) <= TOLERANCE


def test_molora_of_one_expert_is_lora() -> None:
    molora = random_experts(AdapterSpec("molora", rank=3))
    a, b = molora.get_parameter("lora_a"), molora.get_parameter("lora_b")
    lora = with_parameters(
        AdapterSpec("lora", rank=3, alpha=3.0), lora_a=a.t()[None, None], lora_b=b.t()[None, None]
    )
    assert relative_rms(delta(molora), delta(lora)) <= TOLERANCE


def test_sira_that_keeps_all_gates_is_molora() -> None:
    sira = random_experts(AdapterSpec("sira", rank=2, experts=4, top_k=4))
    molora = with_parameters(AdapterSpec("molora", rank=2, experts=4), **sira.state_dict())
    assert torch.equal(delta(sira), delta(molora))
