"""What engines run, against each method's own delta: whole modules, packed ones, cut ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from polyrex.adapters.errors import TensorMismatch
from polyrex.adapters.methods.protocol import Experts
from polyrex.adapters.methods.registry import make_experts
from polyrex.adapters.serving.backends import BACKENDS, choose, explain
from polyrex.adapters.serving.builder import LayerBuilder
from polyrex.adapters.serving.layers import ServedLayer, Slice, StepContext
from polyrex.adapters.spec import AdapterSpec, TargetModule
from polyrex.kernels.routing import RoutingTable, StepRouting
from polyrex.kernels.step_plan import Planner
from support.cases import relative_rms

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
SLOTS = [3, 3, 3, 0, 1, 2, 2, 1, 3]
STATE_BYTES = 1 << 20


def serve(
    slices: Sequence[Slice], dtype: torch.dtype, state_bytes: int = STATE_BYTES
) -> tuple[ServedLayer, Planner]:
    """One layer as an engine has it, and the planner of its steps."""
    builder = LayerBuilder(dtype, CPU, state_bytes)
    layer = builder.build(slices)
    return layer, builder.planner(slices[0].experts)


def drawn(spec: AdapterSpec, target: TargetModule, seed: int) -> Experts:
    experts = make_experts(spec, target)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in experts.named_parameters():
        nn.init.normal_(parameter, std=1e-2 if "raw" in name else 0.7, generator=generator)
    return experts


def filled(experts: Experts, modules: int, planner: Planner | None, seed: int = 0) -> RoutingTable:
    """Three tasks in a table of `modules` modules."""
    spec = experts.spec
    table = RoutingTable(4, modules, experts.table_size(spec), CPU, planner=planner)
    generator = torch.Generator().manual_seed(seed)
    for slot in (1, 2, 3):
        logits = torch.randn(modules, experts.routing_size(spec), generator=generator)
        table.write(slot, experts.route(spec, logits))
    return table


def step_of(table: RoutingTable, slots: Sequence[int], dtype: torch.dtype) -> StepRouting:
    step = table.step(slots, dtype)
    assert step is not None
    return step


def tokens(d_in: int, dtype: torch.dtype, count: int = len(SLOTS)) -> Tensor:
    return torch.randn(count, d_in, generator=torch.Generator().manual_seed(9)).to(dtype)


def twin(experts: Experts, x: Tensor, step: StepRouting, index: int) -> Tensor:
    """The method's delta in float32."""
    exact = replace(step, dtype=torch.float32)
    operands = experts.operands(torch.float32)
    return experts.delta(operands, x.float(), exact.module(index)).detach()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_layer_of_packed_modules(small_spec: AdapterSpec, dtype: torch.dtype) -> None:
    """Three modules of one input side by side, the second of them not adapted."""
    sizes = (21, 6, 9)
    experts = {i: drawn(small_spec, TargetModule(str(i), 15, sizes[i]), i) for i in (0, 2)}
    columns = {0: slice(0, 21), 2: slice(27, 36)}
    slices = [replace(Slice.whole(i, e), columns=columns[i]) for i, e in experts.items()]
    layer, planner = serve(slices, dtype, STATE_BYTES)
    table = filled(experts[0], 3, planner)
    for slots in (SLOTS, SLOTS[::-1], [2] * 300 + [0] + [1] * 300):  # the last one composed
        x, step = tokens(15, dtype, len(slots)), step_of(table, slots, dtype)
        y = torch.zeros(len(slots), 36, dtype=dtype)
        layer.add_(y, x, step)
        for i, own in experts.items():
            assert relative_rms(y[:, columns[i]], twin(own, x, step, i)) <= TOLERANCE[dtype]
        assert torch.equal(y[:, 21:27], torch.zeros_like(y[:, 21:27]))
        base = torch.tensor(slots) == 0
        assert torch.equal(y[base], torch.zeros_like(y[base]))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_layer_adds_to_what_is_there(random_experts: Experts, dtype: torch.dtype) -> None:
    layer, planner = serve([Slice.whole(0, random_experts)], dtype, STATE_BYTES)
    table = filled(random_experts, 1, planner)
    x, step = tokens(random_experts.target.d_in, dtype), step_of(table, SLOTS, dtype)
    before = torch.randn(len(x), random_experts.target.d_out).to(dtype)
    y = before.clone()
    layer.add_(y, x, step)
    expected = before.float() + twin(random_experts, x, step, 0)
    assert relative_rms(y, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dim", ["inputs", "outputs"])
def test_ranks_of_a_cut_module_add_up(random_experts: Experts, dim: str) -> None:
    """What tensor parallelism does, for the methods whose delta is linear in x."""
    if random_experts.routes_by_token:
        pytest.skip("its ranks see the whole input")
    whole = Slice.whole(0, random_experts)
    target = random_experts.target
    size = target.d_in if dim == "inputs" else target.d_out
    table = filled(random_experts, 1, None)
    x, step = tokens(target.d_in, torch.float32), step_of(table, SLOTS, torch.float32)
    y = torch.zeros(len(x), target.d_out)
    for cut in (slice(0, size // 3), slice(size // 3, size)):
        if dim == "inputs":
            part, _ = serve([replace(whole, inputs=cut)], torch.float32)
            part.add_(y, x[:, cut], step)
        else:
            columns = slice(0, cut.stop - cut.start)
            part, _ = serve([replace(whole, outputs=cut, columns=columns)], torch.float32)
            part.add_(y[:, cut], x, step)
    assert relative_rms(y, twin(random_experts, x, step, 0)) <= TOLERANCE[torch.float32]


TOKEN_SPECS = (
    AdapterSpec("molora", rank=2, experts=21),
    AdapterSpec("sira", rank=2, experts=21, top_k=9),
    AdapterSpec("trex", rank=5, rank_out=7),
    AdapterSpec("trex", rank=21, form="diagonal"),
)
THREADED_SPECS = (
    AdapterSpec("poly", rank=20, experts=5),
    AdapterSpec("trex", rank=20, rank_out=5, form="static"),
    AdapterSpec("trex", rank=3, rank_out=7),
    AdapterSpec("sira", rank=2, experts=7),
    AdapterSpec("tensorpoly-2", rank=3, experts=5),
    AdapterSpec("tensorpoly-x", rank=3, experts=5),
)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("spec", THREADED_SPECS, ids=lambda spec: spec.method + str(spec.form))
def test_threads_share_the_work(spec: AdapterSpec, threads: int, dtype: torch.dtype) -> None:
    """Few tokens: they share the matrices. Many: some have tokens of their own, some none."""
    torch.set_num_threads(threads)
    experts = {i: drawn(spec, TargetModule(str(i), 45, 70 + i), i) for i in range(2)}
    slices = [
        replace(Slice.whole(i, e), columns=slice(71 * i, 71 * i + 70 + i))
        for i, e in experts.items()
    ]
    layer, planner = serve(slices, dtype, 0)
    table = filled(experts[0], 2, planner)
    for count in (1, 12, 33, 300, 700):
        slots = torch.randint(4, (count,), generator=torch.Generator().manual_seed(count)).tolist()
        slots[0] = 1
        x, step = tokens(45, dtype, count), step_of(table, slots, dtype)
        y = torch.zeros(count, 142, dtype=dtype)
        layer.add_(y, x, step)
        for i, own in experts.items():
            part = slices[i].columns
            assert relative_rms(y[:, part], twin(own, x, step, i)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("method", ["tensorpoly-2", "tensorpoly-x"])
@pytest.mark.parametrize(("d_in", "d_out"), [(576, 1536), (1537, 192), (2601, 10_001)])
def test_factors_of_many_rows(d_in: int, d_out: int, method: str, dtype: torch.dtype) -> None:
    """Factors larger than the pieces that the operators work in, even and odd."""
    experts = drawn(AdapterSpec(method, rank=3, experts=5), TargetModule("m", d_in, d_out), 0)
    layer, planner = serve([Slice.whole(0, experts)], dtype, 0)
    table = filled(experts, 1, planner)
    x, step = tokens(d_in, dtype), step_of(table, SLOTS, dtype)
    y = torch.zeros(len(x), d_out, dtype=dtype)
    layer.add_(y, x, step)
    assert relative_rms(y, twin(experts, x, step, 0)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("spec", THREADED_SPECS, ids=lambda spec: spec.method + str(spec.form))
def test_a_token_has_one_result(spec: AdapterSpec) -> None:
    """To the last bit, whoever else is in the batch, however many threads there are."""
    experts = drawn(spec, TargetModule("m", 45, 70), 0)
    layer, planner = serve([Slice.whole(0, experts)], torch.float32, 0)
    table = filled(experts, 1, planner)
    x = tokens(45, torch.float32, 700)
    results = []
    for threads, count in itertools.product((1, 2, 3, 5), (1, 12, 33, 700)):
        torch.set_num_threads(threads)
        slots = [2, *torch.randint(4, (count - 1,)).tolist()]
        y = torch.zeros(count, 70)
        layer.add_(y, x[:count], step_of(table, slots, torch.float32))
        results.append(y[0])
    assert all(torch.equal(result, results[0]) for result in results)
    assert results[0].abs().max() > 0


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spec", TOKEN_SPECS, ids=lambda spec: spec.method + str(spec.form))
def test_gates_that_tokens_choose(spec: AdapterSpec, dtype: torch.dtype) -> None:
    """More than a vector of gates, some of them equal, and a router that bfloat16 can hold."""
    experts = drawn(spec, TargetModule("m", 45, 70), 0)
    router = experts.get_parameter("token_router")
    with torch.no_grad():
        router.copy_(router.bfloat16())
        router[2:-2] = router[1]
    layer, _ = serve([Slice.whole(0, experts)], dtype)
    table = filled(experts, 1, None)
    x, step = tokens(45, dtype), step_of(table, SLOTS, dtype)
    y = torch.zeros(len(x), 70, dtype=dtype)
    layer.add_(y, x, step)
    assert relative_rms(y, twin(experts, x, step, 0)) <= TOLERANCE[dtype]


def test_empty_batch(random_experts: Experts) -> None:
    layer, _ = serve([Slice.whole(0, random_experts)], torch.float32)
    step = StepRouting(
        torch.zeros(1, 1, random_experts.table_size(random_experts.spec)),
        torch.zeros(0, dtype=torch.int64),
        torch.float32,
    )
    y = torch.zeros(0, random_experts.target.d_out)
    layer.add_(y, tokens(random_experts.target.d_in, torch.float32, 0), step)
    assert y.shape == (0, random_experts.target.d_out)


def test_a_slot_that_changes_hands_is_made_anew(random_experts: Experts) -> None:
    layer, planner = serve([Slice.whole(0, random_experts)], torch.float32, STATE_BYTES)
    table = filled(random_experts, 1, planner)
    x = tokens(random_experts.target.d_in, torch.float32, 400)
    other = filled(random_experts, 1, None, seed=5).weights[2]
    for weights in (table.weights[2].clone(), other, table.weights[3].clone()):
        table.write(2, weights)
        step = step_of(table, [2] * len(x), torch.float32)
        y = torch.zeros(len(x), random_experts.target.d_out)
        layer.add_(y, x, step)
        assert relative_rms(y, twin(random_experts, x, step, 0)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("method", ["tensorpoly-2", "tensorpoly-x"])
def test_states_that_no_plan_names_are_refused(method: str) -> None:
    experts = drawn(AdapterSpec(method, rank=3, experts=5), TargetModule("m", 15, 9), 0)
    layer, _ = serve([Slice.whole(0, experts)], torch.float32)
    step = step_of(filled(experts, 1, None), SLOTS, torch.float32)
    with pytest.raises(AssertionError, match="no task's state"):
        layer.add_(torch.zeros(len(SLOTS), 9), tokens(15, torch.float32), step)


def test_choice_of_a_backend_says_why() -> None:
    def choice(spec: AdapterSpec, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
        return explain(spec, dtype, CPU)

    assert choice(AdapterSpec("poly", experts=4)) == ("compiled rank space", "rank space on cpu")
    assert choice(AdapterSpec("sira", experts=8)) == ("compiled token gates", "token space on cpu")
    backend, reason = choice(AdapterSpec("poly", experts=4), torch.float16)
    assert (backend, "float16" in reason) == ("pytorch", True)
    backend, reason = choice(AdapterSpec("tensorpoly-2", rank=20, experts=4))
    assert (backend, "not 20" in reason) == ("pytorch", True)


@pytest.mark.parametrize(
    ("spec", "backend", "reason"),
    [
        (AdapterSpec("poly", experts=4), "triton rank space", "rank space on cuda"),
        (AdapterSpec("tensorpoly-1", experts=4), "triton rank space", "rank space on cuda"),
        (AdapterSpec("tensorpoly-2", experts=4), "triton factored", "leaf space on cuda"),
        (AdapterSpec("trex", form="static"), "triton pair space", "pair space on cuda"),
        (AdapterSpec("mhr", experts=4, splits=2), "pytorch", "mhr has no layer on the Triton"),
        (AdapterSpec("trex"), "pytorch", "there is no kernel for trex on cuda"),
        (AdapterSpec("tensorpoly-x", experts=4), "pytorch", "no kernel for tensorpoly-x on cuda"),
    ],
    ids=lambda value: value.method if isinstance(value, AdapterSpec) else "",
)
def test_backends_of_a_gpu(spec: AdapterSpec, backend: str, reason: str) -> None:
    found, why = explain(spec, torch.bfloat16, torch.device("cuda"))
    assert (found, reason in why) == (backend, True)


def test_a_device_without_kernels_runs_the_formula() -> None:
    found = explain(AdapterSpec("lora"), torch.float32, torch.device("mps"))
    assert found == ("pytorch", "there is no kernel for lora on mps")


def test_part_of_a_module_of_leaves_runs_on_a_gpu() -> None:
    experts = drawn(AdapterSpec("tensorpoly-2", rank=3, experts=5), TargetModule("m", 15, 9), 0)
    part = replace(Slice.whole(0, experts), inputs=slice(0, 5))
    assert choose([part], torch.bfloat16, torch.device("cuda")).backend.name == "triton factored"


def test_graphs_of_an_earlier_builders_layers_are_void() -> None:
    context = StepContext()
    LayerBuilder(torch.float32, CPU, 0, context)
    before = context.generation
    LayerBuilder(torch.float32, CPU, 0, context)
    assert context.generation > before


def test_every_space_has_a_row_for_the_cpu(small_specs: tuple[AdapterSpec, ...]) -> None:
    rows = {backend.space for backend in BACKENDS if backend.device == "cpu"}
    assert {make_experts(s, TargetModule("m", 15, 9)).space for s in small_specs} == rows


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tolerance_tells_another_tasks_adapter(dtype: torch.dtype) -> None:
    experts = drawn(AdapterSpec("poly", rank=3, experts=5), TargetModule("m", 15, 9), 0)
    layer, _ = serve([Slice.whole(0, experts)], dtype)
    table = filled(experts, 1, None)
    x, wrong = tokens(15, dtype), step_of(table, [1, *SLOTS[1:]], dtype)
    y = torch.zeros(len(x), 9, dtype=dtype)
    layer.add_(y, x, wrong)
    assert relative_rms(y, twin(experts, x, step_of(table, SLOTS, dtype), 0)) > 2 * TOLERANCE[dtype]


def test_experts_that_overflow_are_refused(random_experts: Experts) -> None:
    with torch.no_grad():
        next(random_experts.parameters()).fill_(float("inf"))
    with pytest.raises(TensorMismatch, match="not finite"):
        serve([Slice.whole(0, random_experts)], torch.float32)


def test_routing_of_too_few_tokens_is_refused(random_experts: Experts) -> None:
    layer, planner = serve([Slice.whole(0, random_experts)], torch.float32)
    step = step_of(filled(random_experts, 1, planner), SLOTS[:-1], torch.float32)
    x = tokens(random_experts.target.d_in, torch.float32)
    with pytest.raises(RuntimeError, match="expected routing for 9 tokens, got it for 8"):
        layer.add_(torch.zeros(len(x), random_experts.target.d_out), x, step)
