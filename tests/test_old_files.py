"""Files written by the code of commit 5e719e6 are read, served and written again unchanged.

tests/fixtures/write_old_files.py wrote them, together with what that code computed from them.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from polyrex.adapters.errors import DataError, InventoryMismatch
from polyrex.adapters.files.bundle import Bundle
from polyrex.adapters.files.inventory import (
    Inventory,
    load_experts,
    read_inventory,
    write_inventory,
)
from polyrex.adapters.files.router import read_router, router_bytes
from polyrex.adapters.files.task import TaskVersion
from polyrex.adapters.methods.protocol import LearningRates
from polyrex.adapters.model.attach import attach, find_targets
from polyrex.adapters.model.base_model import load_base
from polyrex.server.config import RegistryConfig
from polyrex.server.engines.base import SamplingParams, Token
from polyrex.server.engines.embedded.engine import EmbeddedEngine
from polyrex.server.launch.loading import open_registry
from polyrex.server.registry.principal import OPERATOR
from polyrex.training.data.batches import Example
from polyrex.training.loop.run import LoopConfig, StepRecord, run
from polyrex.training.model.multi_task import MultiTaskModel
from support.engine_calls import SMALL, Answer, PlainModel, at_once, complete, started

OLD = Path(__file__).parent / "fixtures" / "old_files"
BASE = str(OLD / "base")
EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text())
INVENTORIES = sorted(EXPECTED["inventories"])
WITHOUT_ROUTING = {"lora", "tlora", "molora", "sira"}
"""Methods whose routers hold no numbers, so that all tasks are the same."""
ROUTED = [name for name in INVENTORIES if name not in WITHOUT_ROUTING]
PROMPTS = [tuple(prompt) for prompt in EXPECTED["prompts"]]
RUNS = sorted(EXPECTED["training"]["runs"])
TOLERANCE = 1e-5
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SCORED = SamplingParams(
    max_tokens=6, temperature=0.0, logprobs=0, prompt_logprobs=0, ignore_eos=True
)

Expected = Mapping[str, list[Any]]
Polyrex = Callable[..., str]


@dataclass(frozen=True)
class Served:
    """What the embedded engine answers now, by task (None: the base model) and prompt."""

    alone: Mapping[str | None, list[Answer]]
    together: Mapping[str | None, list[Answer]]


def path_of(name: str) -> Path:
    return OLD / "inventories" / name / "inventory.safetensors"


def expected_of(name: str) -> dict[str | None, list[Expected]]:
    """The old answers with every router of an inventory, and of the base model."""
    tasks = EXPECTED["inventories"][name]["tasks"]
    return {None: EXPECTED["base"], **{task: found["answers"] for task, found in tasks.items()}}


def pinned(inventory: Inventory, state: Path) -> dict[str | None, TaskVersion | None]:
    """Every task that lies beside an inventory, as a registry pins it; None: the base model."""
    with closing(open_registry(RegistryConfig(), state, Bundle(inventory))) as registry:
        assert not registry.rejected
        names = [task.name for task in registry.page(OPERATOR).tasks]
        return {None: None, **{name: registry.pin(OPERATOR, name) for name in names}}


def numbers(tokens: Sequence[Token]) -> list[float]:
    return [token.logprob for token in tokens if token.logprob is not None]


def check(found: Answer, expected: Expected) -> None:
    """The same tokens, and log-probabilities as close as rounding allows."""
    assert list(found.ids) == expected["tokens"]
    assert found.prompt is not None
    said = numbers(found.prompt) + numbers(found.tokens)
    before = expected["prompt_logprobs"] + expected["logprobs"]
    assert said == pytest.approx(before, rel=0, abs=TOLERANCE)


async def answers(engine: EmbeddedEngine, tasks: Mapping[str | None, TaskVersion | None]) -> Served:
    async with started(engine):
        alone = {
            name: [await complete(engine, prompt, task, SCORED) for prompt in PROMPTS]
            for name, task in tasks.items()
        }
        asked = [(prompt, task) for prompt in PROMPTS for task in tasks.values()]
        mixed = await at_once(engine, asked, SCORED)
    return Served(alone, {name: mixed[i :: len(tasks)] for i, name in enumerate(tasks)})


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in the order in which the old code computed them; and more threads only wait here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Served]:
    """The answers with the routers of an inventory, each inventory served once."""
    known: dict[str, Served] = {}

    def serve(name: str) -> Served:
        if name not in known:
            inventory = read_inventory(path_of(name))
            tasks = pinned(inventory, tmp_path_factory.mktemp("state"))
            adapted = load_experts(inventory, load_base(BASE, torch.float32))
            engine = EmbeddedEngine(adapted, inventory, SMALL)
            known[name] = asyncio.run(answers(engine, tasks))
        return known[name]

    return serve


@pytest.fixture
def polyrex(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Polyrex:
    """Runs the console script in this process and returns what it prints."""
    (script,) = entry_points(group="console_scripts", name="polyrex")
    main = script.load()

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["polyrex", *map(str, arguments)])
        code = None
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        assert not code, captured
        return captured.out

    return call


@pytest.mark.parametrize("name", INVENTORIES)
def test_inventory_and_its_routers_are_read(name: str, tmp_path: Path) -> None:
    inventory, expected = read_inventory(path_of(name)), EXPECTED["inventories"][name]
    assert inventory.sha256 == expected["sha256"]
    tasks = pinned(inventory, tmp_path)
    hashes = {key: task.router.sha256 for key, task in tasks.items() if task is not None}
    assert hashes == {key: found["sha256"] for key, found in expected["tasks"].items()}


def test_inventory_with_one_changed_byte_is_another_one(tmp_path: Path) -> None:
    data = bytearray(path_of("poly").read_bytes())
    data[-2] ^= 1
    (tmp_path / "inventory.safetensors").write_bytes(data)
    changed = read_inventory(tmp_path / "inventory.safetensors")
    assert changed.sha256 != EXPECTED["inventories"]["poly"]["sha256"]
    router = path_of("poly").parent / "routers" / "first.safetensors"
    with pytest.raises(InventoryMismatch):
        read_router(router.read_bytes(), "first", changed)


@pytest.mark.parametrize("name", INVENTORIES)
def test_inventory_and_its_routers_are_written_again_byte_for_byte(
    name: str, tmp_path: Path
) -> None:
    inventory = read_inventory(path_of(name))
    dtype = getattr(torch, EXPECTED["inventories"][name]["dtype"])
    adapted = load_experts(inventory, load_base(BASE, torch.float32))
    again = tmp_path / "inventory.safetensors"
    assert write_inventory(again, adapted, dtype=dtype) == inventory.sha256
    assert again.read_bytes() == path_of(name).read_bytes()
    for router_path in (path_of(name).parent / "routers").iterdir():
        data = router_path.read_bytes()
        router = read_router(data, router_path.name, inventory)
        assert router_bytes(router.logits, inventory.spec, router.metadata) == data
    trained = next(p for p in adapted.model.parameters() if p.requires_grad)
    with torch.no_grad():
        trained.add_(0.01)
    assert write_inventory(again, adapted, dtype=dtype) != inventory.sha256


@pytest.mark.parametrize("name", INVENTORIES)
def test_engine_gives_the_old_answers(name: str, served: Callable[[str], Served]) -> None:
    found, expected = served(name).alone, expected_of(name)
    assert found.keys() == expected.keys()
    for task, old in expected.items():
        for answer, old_answer in zip(found[task], old, strict=True):
            check(answer, old_answer)


@pytest.mark.parametrize("name", INVENTORIES)
def test_mixed_batch_gives_the_old_answers(name: str, served: Callable[[str], Served]) -> None:
    found, expected = served(name).together, expected_of(name)
    assert found.keys() == expected.keys()
    for task, old in expected.items():
        for answer, old_answer in zip(found[task], old, strict=True):
            check(answer, old_answer)


@pytest.mark.parametrize("name", ROUTED)
def test_exchanged_routers_give_other_answers(name: str, served: Callable[[str], Served]) -> None:
    expected = expected_of(name)
    first, second, *_ = sorted(task for task in expected if task is not None)
    found = served(name).alone[second]
    assert [list(answer.ids) for answer in found] != [old["tokens"] for old in expected[first]]


@pytest.mark.parametrize("name", INVENTORIES)
def test_adapters_change_the_base_models_answers(
    name: str, served: Callable[[str], Served]
) -> None:
    for task, found in served(name).alone.items():
        if task is not None:
            ids = [list(answer.ids) for answer in found]
            assert ids != [old["tokens"] for old in EXPECTED["base"]]


def check_logits(logits: Tensor, prompt: tuple[int, ...], expected: Expected) -> None:
    """The same answer, from the logits [tokens, vocabulary] of the prompt and its answer."""
    tokens = torch.tensor((*prompt, *expected["tokens"]))
    rows = logits.log_softmax(-1)
    assert rows[len(prompt) - 1 : -1].argmax(-1).tolist() == expected["tokens"]
    said = rows[:-1].gather(1, tokens[1:].unsqueeze(1)).flatten()
    before = torch.tensor(expected["prompt_logprobs"] + expected["logprobs"])
    torch.testing.assert_close(said, before, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", INVENTORIES)
def test_model_without_an_engine_gives_the_old_answers(name: str, tmp_path: Path) -> None:
    inventory, expected = read_inventory(path_of(name)), expected_of(name)
    plain = PlainModel(load_experts(inventory, load_base(BASE, torch.float32)), inventory)
    for name_of_task, task in pinned(inventory, tmp_path).items():
        for prompt, old in zip(PROMPTS, expected[name_of_task], strict=True):
            check_logits(plain.logprobs((*prompt, *old["tokens"]), task), prompt, old)


@torch.inference_mode()
def test_base_model_alone_gives_the_old_answers() -> None:
    model: Any = load_base(BASE, torch.float32)
    for prompt, old in zip(PROMPTS, EXPECTED["base"], strict=True):
        check_logits(model(torch.tensor([(*prompt, *old["tokens"])])).logits[0], prompt, old)


def train(name: str, checkpoint: Path | None, **changes: Any) -> list[StepRecord]:
    """Run what was stopped half way to its end; `changes` are to its LoopConfig."""
    old = EXPECTED["training"]
    loop = LoopConfig(**{**old["loop"], "rates": LearningRates(**old["loop"]["rates"]), **changes})
    examples = [
        Example(row["task"], tuple(row["prompt"]), tuple(row["answer"])) for row in old["rows"]
    ]
    base = load_base(BASE, torch.float32)
    adapted = attach(base, read_inventory(path_of(name)).spec, find_targets(base))
    model = MultiTaskModel(adapted, 3, seed=loop.seed)
    groups = model.parameter_groups()
    return run(model, groups, examples, loop, pad=0, checkpoint=checkpoint, progress=lambda _: None)


def losses(curve: Sequence[StepRecord]) -> list[float]:
    return [record.loss for record in curve]


@pytest.mark.parametrize("name", RUNS)
def test_checkpoint_resumes_to_the_whole_runs_curve(name: str, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.safetensors"
    shutil.copyfile(OLD / "checkpoints" / f"{name}.safetensors", file)
    with safe_open(file, framework="pt") as opened:
        begun = json.loads(opened.metadata()["curve"])
    curve = train(name, file)
    assert [asdict(record) for record in curve[: len(begun)]] == begun
    assert losses(curve) == pytest.approx(EXPECTED["training"]["runs"][name], rel=0, abs=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_whole_run_follows_the_old_curve(name: str) -> None:
    expected = EXPECTED["training"]["runs"][name]
    assert losses(train(name, None)) == pytest.approx(expected, rel=0, abs=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_checkpoint_without_its_moments_gives_another_curve(name: str, tmp_path: Path) -> None:
    old, file = OLD / "checkpoints" / f"{name}.safetensors", tmp_path / "checkpoint.safetensors"
    with safe_open(old, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(old)
    for key in tensors:
        if key.startswith("exp_avg/"):
            tensors[key].zero_()
    save_file(tensors, file, metadata)
    expected = EXPECTED["training"]["runs"][name]
    assert losses(train(name, file)) != pytest.approx(expected, rel=0, abs=1e-4)


def test_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.safetensors"
    shutil.copyfile(OLD / "checkpoints" / f"{RUNS[0]}.safetensors", file)
    with pytest.raises(DataError, match="a checkpoint of another configuration"):
        train(RUNS[0], file, seed=1)


@pytest.mark.parametrize("export", sorted(path.name for path in (OLD / "exported").iterdir()))
def test_export_is_the_same(export: str, polyrex: Polyrex, tmp_path: Path) -> None:
    """Byte for byte, but for the last bit of sides that are sums over experts."""
    name, task = export.split("-")
    for other in ("first", "second"):
        router = path_of(name).parent / "routers" / f"{other}.safetensors"
        files = ("--inventory", path_of(name), "--router", router)
        polyrex("export", *files, "--out", tmp_path / other, "--base", "tiny")
    old, new = OLD / "exported" / export, tmp_path / task
    assert (new / CONFIG).read_bytes() == (old / CONFIG).read_bytes()
    found, expected = (folder / WEIGHTS for folder in (new, old))
    if name == "lora":
        assert found.read_bytes() == expected.read_bytes()
    assert found.stat().st_size == expected.stat().st_size
    torch.testing.assert_close(load_file(found), load_file(expected), rtol=1e-6, atol=1e-8)
    same = (tmp_path / "first" / WEIGHTS).read_bytes() == (
        tmp_path / "second" / WEIGHTS
    ).read_bytes()
    assert same == (name in WITHOUT_ROUTING)


FINGERPRINT_BYTES = 56
"""Of a header that says for which weights it was made; headers are padded to 8 bytes."""


@pytest.mark.parametrize("rank", [4, 3])
def test_exports_compress_to_the_old_report(rank: int, polyrex: Polyrex, tmp_path: Path) -> None:
    """The report of rank 4 was kept; that of rank 3 must be another."""
    options = ("--base", BASE, "--out", tmp_path, "--rank", rank)
    polyrex("compress", OLD / "exported", *options)
    report = json.loads((tmp_path / "report.json").read_text())
    old = json.loads((path_of("compressed").parent / "report.json").read_text())
    # The fingerprint of the base model's weights is new, in a file of rank 4 as in any other.
    for size in ("bytes_after", "inventory_bytes"):
        report[size] -= FINGERPRINT_BYTES
    found, expected = report.pop("by_task"), old.pop("by_task")
    assert found.keys() == expected.keys()
    close = report == pytest.approx(old, abs=2e-5) and all(
        found[task] == pytest.approx(expected[task], abs=2e-5) for task in expected
    )
    assert close == (rank == 4)


def test_parameter_counts_are_the_old_ones(polyrex: Polyrex) -> None:
    """`polyrex params` for T0-3B with every method, as it was typed and as it answered."""
    commands = (OLD / "params.txt").read_text().split("$ polyrex ")[1:]
    printed = []
    for command in commands:
        line, old = command.split("\n", 1)
        printed.append(polyrex(*line.split()))
        assert printed[-1] == old, line
    assert len(set(printed)) > len(printed) // 2
