"""What every method keeps: silence where it is switched off, gradients, independence of tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyrex.adapters.errors import SpecError, UnknownMethod
from polyrex.adapters.methods.protocol import Experts
from polyrex.adapters.methods.registry import METHODS, make_experts, method_class
from polyrex.adapters.spec import AdapterSpec, TargetModule
from polyrex.kernels.routing import ModuleRouting, StepRouting
from support.cases import relative_rms

TASKS, TOKENS = 3, 7


def routing_of(weights: Tensor, rows: Tensor, dtype: torch.dtype) -> ModuleRouting:
    return StepRouting(weights.unsqueeze(1), rows, dtype).module(0)


def draw(experts: Experts, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [T, d_in], router logits [D, R], and the row of each token."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(TASKS, experts.routing_size(experts.spec), generator=generator)
    x = torch.randn(TOKENS, experts.target.d_in, generator=generator)
    rows = torch.randint(TASKS, (TOKENS,), generator=generator)
    return x.to(dtype), logits.to(dtype), rows


def test_small_specs_cover_every_method(small_specs: tuple[AdapterSpec, ...]) -> None:
    assert {spec.method for spec in small_specs} == set(METHODS)


def test_small_specs_are_of_every_form(small_specs: tuple[AdapterSpec, ...]) -> None:
    assert {s.form for s in small_specs if s.method == "trex"} == {"mix", "diagonal", "static"}
    for method in ("tensorpoly-1", "tensorpoly-2"):
        orders = {(s.order, s.norm) for s in small_specs if s.method == method}
        assert orders >= {(2, "layer"), (4, "layer"), (3, "none")}
    assert {s.order for s in small_specs if s.method == "tensorpoly-x"} >= {2, 3}
    assert max(s.splits for s in small_specs if s.method == "mhr") == 3


def test_gradients_are_right(random_experts: Experts) -> None:
    experts = random_experts.double()
    x, logits = (drawn[:2] for drawn in draw(experts, torch.float64)[:2])
    rows = torch.tensor([1, 0])
    inputs = [x, *experts.parameters()] + ([logits] if logits.numel() else [])
    for tensor in inputs:
        tensor.requires_grad_()

    # gradcheck nudges the parameters in place: the function reads them from `experts`.
    def delta(x: Tensor, *_: Tensor) -> Tensor:
        weights = experts.route(experts.spec, logits)
        operands = experts.operands(torch.float64)
        return experts.delta(operands, x, routing_of(weights, rows, torch.float64))

    assert torch.autograd.gradcheck(delta, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_of_zeros_gives_exactly_nothing(random_experts: Experts, dtype: torch.dtype) -> None:
    x, logits, rows = draw(random_experts, dtype)
    weights = random_experts.route(random_experts.spec, logits.float())
    weights[rows[0]] = 0
    routing = routing_of(weights, rows, dtype)
    delta = random_experts.delta(random_experts.operands(dtype), x, routing)
    off = rows == rows[0]
    assert torch.equal(delta[off], torch.zeros_like(delta[off]))
    assert (delta[~off] != 0).any(-1).all()


def test_fresh_adapter_changes_nothing_and_can_learn(
    small_spec: AdapterSpec, small_target: TargetModule
) -> None:
    experts = make_experts(small_spec, small_target)
    generator = torch.Generator().manual_seed(0)
    experts.reset(generator)
    x, _, rows = draw(experts)
    fresh = [experts.initial_logits(small_spec, generator) for _ in range(TASKS)]
    weights = experts.route(small_spec, torch.stack(fresh))
    operands = experts.operands(torch.float32)
    delta = experts.delta(operands, x, routing_of(weights, rows, x.dtype))
    assert torch.equal(delta, torch.zeros_like(delta))
    (delta * torch.randn(delta.shape, generator=generator)).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad.norm() for p in experts.parameters() if p.grad is not None]
    assert max(gradients) > 1e-3


def test_token_depends_on_no_other(random_experts: Experts) -> None:
    x, logits, rows = draw(random_experts)
    weights = random_experts.route(random_experts.spec, logits)
    operands = random_experts.operands(x.dtype)
    together = random_experts.delta(operands, x, routing_of(weights, rows, x.dtype))
    for t in range(TOKENS):
        own = routing_of(weights[rows[t]][None], torch.tensor([0]), x.dtype)
        alone = random_experts.delta(operands, x[t : t + 1], own)
        assert relative_rms(together[t : t + 1], alone) < 1e-5


def composed_delta(experts: Experts, x: Tensor, weights: Tensor) -> Tensor:
    """For runs x [G, n, d_in], each with its row of weights [G, W], or one row for all."""
    operands = experts.operands(x.dtype)
    return experts.compose(operands, weights, x.dtype).delta(x)[..., : experts.target.d_out]


@pytest.mark.parametrize("tasks", [1, TASKS])
def test_composed_adapters_give_what_tokens_give(random_experts: Experts, tasks: int) -> None:
    """With a wrong case: another task's weights."""
    x, logits, _ = draw(random_experts)
    runs = torch.stack([x + i for i in range(TASKS)])
    weights = random_experts.route(random_experts.spec, logits)[:tasks]
    if random_experts.routes_by_token:
        with pytest.raises(SpecError, match="every token has its own adapter"):
            composed_delta(random_experts, runs, weights)
        return
    rows = (torch.arange(TASKS) % tasks).repeat_interleave(len(x))
    routing = routing_of(weights, rows, x.dtype)
    operands = random_experts.operands(x.dtype)
    by_token = random_experts.delta(operands, runs.flatten(0, 1), routing)
    found = composed_delta(random_experts, runs, weights)
    assert relative_rms(found.flatten(0, 1), by_token) < 1e-5
    if tasks > 1 and logits.numel():
        wrong = composed_delta(random_experts, runs, weights.roll(1, 0))
        assert relative_rms(wrong.flatten(0, 1), by_token) > 1e-2


def test_composed_adapters_have_the_gradients_of_tokens(random_experts: Experts) -> None:
    if random_experts.routes_by_token:
        pytest.skip("every token has its own adapter")
    experts = random_experts.double()
    x, logits, _ = draw(experts, torch.float64)
    logits.requires_grad_(logits.numel() > 0)
    leaves = [*experts.parameters()] + ([logits] if logits.numel() else [])
    rows = torch.arange(TASKS).repeat_interleave(len(x))
    runs = torch.stack([x + i for i in range(TASKS)])
    upstream = torch.randn(TASKS, len(x), experts.target.d_out, dtype=torch.float64)

    def gradients(*, composed: bool) -> tuple[Tensor, ...]:
        weights = experts.route(experts.spec, logits)
        if composed:
            delta = composed_delta(experts, runs, weights)
        else:
            routing = routing_of(weights, rows, torch.float64)
            delta = experts.delta(experts.operands(torch.float64), runs.flatten(0, 1), routing)
        return torch.autograd.grad((delta.view_as(upstream) * upstream).sum(), leaves)

    for found, expected in zip(gradients(composed=True), gradients(composed=False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_batch_of_rows_spreads_them_over_its_tokens(random_experts: Experts) -> None:
    x, logits, _ = draw(random_experts)
    weights = random_experts.route(random_experts.spec, logits)
    rows = torch.tensor([2, 0])
    operands = random_experts.operands(x.dtype)
    step = StepRouting(weights.unsqueeze(1), rows, x.dtype).spread(6)
    found = random_experts.delta(operands, x[:6], step.module(0))
    by_token = routing_of(weights, rows.repeat_interleave(3), x.dtype)
    assert torch.equal(found, random_experts.delta(operands, x[:6], by_token))


def test_batch_without_tokens_has_no_delta(random_experts: Experts) -> None:
    x, logits, rows = draw(random_experts)
    weights = random_experts.route(random_experts.spec, logits)
    routing = routing_of(weights, rows[:0], x.dtype)
    delta = random_experts.delta(random_experts.operands(x.dtype), x[:0], routing)
    assert delta.shape == (0, random_experts.target.d_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_delta_is_in_the_dtype_of_the_tokens(random_experts: Experts, dtype: torch.dtype) -> None:
    x, logits, rows = draw(random_experts, dtype)
    weights = random_experts.route(random_experts.spec, logits.float())
    routing = routing_of(weights, rows, dtype)
    delta = random_experts.delta(random_experts.operands(dtype), x, routing)
    assert delta.dtype == dtype


def test_row_of_the_table_has_the_size_that_the_method_says(random_experts: Experts) -> None:
    _, logits, _ = draw(random_experts)
    weights = random_experts.route(random_experts.spec, logits)
    assert weights.shape == (TASKS, random_experts.table_size(random_experts.spec))


@pytest.mark.parametrize("method", ["poly", "mhr", "tensorpoly-1", "tensorpoly-2", "tensorpoly-x"])
def test_sampled_routing_is_normalised_and_varies(method: str) -> None:
    spec = AdapterSpec(method, experts=4)
    cls = method_class(method)
    logits = torch.zeros(100, cls.routing_size(spec))
    torch.manual_seed(0)
    weights = cls.route(spec, logits, sample=True)
    sums = weights.view(100, -1, 4).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    assert weights.std() > 0.1


def test_misspelt_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownMethod, match="did you mean tensorpoly-1 or "):
        method_class("tensorpoly1")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (AdapterSpec("lora", splits=2), r"lora has no splits \(got 2\)"),
        (AdapterSpec("poly", order=4), r"poly has no order \(got 4\)"),
        (AdapterSpec("tensorpoly-1", order=3), "defined for order 2 and 4, got 3"),
        (AdapterSpec("tensorpoly-2", order=1), "defined for order 2 and 4, got 1"),
        (AdapterSpec("trex", rank=4, rank_out=5, form="diagonal"), "equal to rank 4, got 5"),
        (AdapterSpec("sira", experts=4), "top_k must be at most experts, 4, got 6"),
        (AdapterSpec("mhr", experts=2, splits=4), "d_in 15 does not divide into 4 splits"),
    ],
    ids=str,
)
def test_hyperparameters_that_make_no_adapter_are_refused(spec: AdapterSpec, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make_experts(spec, TargetModule("layer", 15, 9))
