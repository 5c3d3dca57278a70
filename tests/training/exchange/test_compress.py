"""Many LoRAs onto shared bases."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from bench.compress.scores import compare
from polyrex.adapters.errors import DataError, SpecError
from polyrex.adapters.files.inventory import load_experts, read_inventory
from polyrex.adapters.files.router import read_router
from polyrex.adapters.methods.composed import LowRank
from polyrex.adapters.model.attach import find_targets
from polyrex.adapters.model.base_model import load_base
from polyrex.adapters.model.routed_linear import AddComposed
from polyrex.adapters.peft.lora_checkpoint import PeftLora, read_lora, write_lora
from polyrex.training.exchange.compress import compress
from polyrex.training.exchange.lora_folder import compress_loras, read_loras
from support.command_line import polyrex

ROWS = Path(__file__).parents[3] / "training" / "rows"
INNER = 5
"""All LoRAs lie in a space of so many dimensions on either side of every module."""


@pytest.fixture
def loras(tiny_base: Path) -> list[PeftLora]:
    """Seven LoRAs of ranks 2 to 4; the third has nothing on the attention."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    targets = find_targets(load_base(str(tiny_base), torch.float32))
    bases = {t: (draw(INNER, t.d_in), draw(INNER, t.d_out)) for t in targets}
    return [
        PeftLora(
            f"task-{number}",
            {
                target.name: LowRank(
                    (draw(2 + number % 3, INNER) @ a).unsqueeze(0),
                    0.01 * (draw(2 + number % 3, INNER) @ b).unsqueeze(0),
                )
                for target, (a, b) in bases.items()
                if number != 2 or "mlp" in target.name
            },
        )
        for number in range(7)
    ]


def matrix(pair: LowRank) -> torch.Tensor:
    return pair.a[0].T @ pair.b[0]


def relative_error(found: dict[str, torch.Tensor], lora: PeftLora) -> float:
    lost = kept = 0.0
    for name, compressed in found.items():
        there = lora.modules.get(name)
        original = matrix(there) if there else torch.zeros_like(compressed)
        lost += (original - compressed).square().sum().item()
        kept += original.square().sum().item()
    return math.sqrt(lost / kept)


@pytest.mark.parametrize("rank", [2, INNER])
def test_error_is_what_is_lost(loras: list[PeftLora], tiny_base: Path, rank: int) -> None:
    """And nothing is, at the rank of the space that all LoRAs lie in."""
    found = compress(loras, load_base(str(tiny_base), torch.float32), rank=rank)
    for lora in loras:
        compressed = {}
        for index, layer in enumerate(found.adapted.layers):
            experts = layer.experts
            row = found.logits[lora.name][index].unsqueeze(0)
            pair = experts.compose(experts.operands(torch.float32), row, torch.float32)
            assert isinstance(pair, LowRank)
            compressed[experts.target.name] = matrix(pair).detach()
        error = relative_error(compressed, lora)
        assert found.errors[lora.name] == pytest.approx(error, abs=2e-3)
        assert error < 2e-3 if rank == INNER else error > 0.1


def test_bases_are_better_than_any_tasks_own(loras: list[PeftLora], tiny_base: Path) -> None:
    """The first task's own sides, as bases for all, lose more."""
    found = compress(loras, load_base(str(tiny_base), torch.float32), rank=2)
    name = found.adapted.targets[0].name
    own = loras[0].modules[name]
    a, b = (torch.linalg.qr(side[0].T).Q for side in own)  # [d, 2]
    target = matrix(loras[1].modules[name])
    with_own = (target - a @ (a.T @ target @ b) @ b.T).norm() / target.norm()
    assert found.errors[loras[1].name] < with_own


@pytest.mark.parametrize("error", [0.05, 0.5])
def test_error_target_is_kept(loras: list[PeftLora], tiny_base: Path, error: float) -> None:
    found = compress(loras, load_base(str(tiny_base), torch.float32), error=error)
    assert max(found.errors.values()) <= error
    assert found.adapted.spec.rank == INNER if error == 0.05 else found.adapted.spec.rank < INNER


def test_error_that_no_rank_reaches_is_refused(tiny_base: Path) -> None:
    """The bases are as wide as the narrowest module: on others, full matrices do not fit."""
    generator = torch.Generator().manual_seed(0)
    targets = find_targets(load_base(str(tiny_base), torch.float32))

    def full(width: int) -> torch.Tensor:
        return torch.randn(1, 64, width, generator=generator)

    many = [
        PeftLora(f"t{i}", {t.name: LowRank(full(t.d_in), full(t.d_out)) for t in targets})
        for i in range(3)
    ]
    with pytest.raises(DataError, match=r"no rank keeps every task's error below 0\.001: at \d+"):
        compress(many, load_base(str(tiny_base), torch.float32), error=0.001)


def test_rank_or_error_and_not_both(loras: list[PeftLora], tiny_base: Path) -> None:
    model = load_base(str(tiny_base), torch.float32)
    for options in ({}, {"rank": 3, "error": 0.1}):
        with pytest.raises(DataError, match="a rank, or an error, and not both"):
            compress(loras, model, **options)  # type: ignore[arg-type]


def test_loras_of_another_model_are_refused(loras: list[PeftLora], tiny_base: Path) -> None:
    elsewhere = PeftLora("other", {"no.such.layer": next(iter(loras[0].modules.values()))})
    with pytest.raises(SpecError, match=r"no\.such\.layer"):
        compress([*loras, elsewhere], load_base(str(tiny_base), torch.float32), rank=2)
    name, pair = next(iter(loras[0].modules.items()))
    narrow = PeftLora("narrow", {name: LowRank(pair.a[..., :-1], pair.b)})
    with pytest.raises(DataError, match="another shape"):
        compress([*loras, narrow], load_base(str(tiny_base), torch.float32), rank=2)


def test_command_compresses_a_folder_and_reports(
    loras: list[PeftLora], tiny_base: Path, tmp_path: Path
) -> None:
    """The inventory and its routers are what a server loads, and give the LoRAs' logits."""
    for lora in loras:
        write_lora(tmp_path / "loras" / lora.name, lora.modules, "tiny")
    command = ("compress", tmp_path / "loras", "--base", tiny_base, "--out", tmp_path / "out")
    done = polyrex(*command, "--rank", INNER)
    assert done.exit_code == 0, done.output
    assert f"7 LoRAs on shared bases of rank {INNER}" in done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["mean_agreement"] == 1
    assert report["worst_error"] < 2e-3
    assert report["bytes_before"] > sum(
        (tmp_path / "loras" / lora.name / "adapter_model.safetensors").stat().st_size
        for lora in loras[:-1]
    )
    inventory = read_inventory(tmp_path / "out" / "inventory.safetensors")
    model = load_base(str(tiny_base), torch.float32)
    adapted = load_experts(inventory, model)
    tokens = torch.arange(9).unsqueeze(0)
    lora = read_lora(tmp_path / "loras" / "task-1")
    path = tmp_path / "out" / "routers" / "task-1.safetensors"
    router = read_router(path.read_bytes(), str(path), inventory)
    with torch.no_grad(), adapted.routed(router.logits):
        found = model(input_ids=tokens).logits
        for target, layer in zip(adapted.targets, adapted.layers, strict=True):
            layer.added = AddComposed(lora.modules[target.name])
        expected = model(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_drift_counts_every_token_of_all_texts_once(
    loras: list[PeftLora],
    tiny_base: Path,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    for lora in loras[:2]:
        write_lora(tmp_path / "loras" / lora.name, lora.modules, "tiny")

    def drift(*texts: str) -> float:
        out = tmp_path / "out"
        report = compress_loras(tmp_path / "loras", out, str(tiny_base), rank=1, texts=texts)
        found: float = report["mean_divergence"]
        return found

    short, long = "one", "one two three four five six seven eight"
    lengths = len(tokenizer.encode(short)), len(tokenizer.encode(long))
    apart = drift(short), drift(long)
    expected = sum(n * each for n, each in zip(lengths, apart, strict=True)) / sum(lengths)
    assert min(apart) > 0.001
    assert drift(short, long) == pytest.approx(expected, abs=2e-5)


def test_compressed_tasks_answer_as_the_originals_do(base_path: str, tmp_path: Path) -> None:
    """On real rows, by the real model: strong random LoRAs, on bases wide enough for all."""
    model = load_base(base_path, torch.bfloat16)
    targets = find_targets(model, r"model\.layers\.29\..*(o|down)_proj")
    torch.manual_seed(0)
    names = ("plural-0", "wic_wn-0", "wic_wn-1")
    for name in names:
        pairs = {
            target.name: LowRank(
                torch.randn(1, 4, target.d_in), 0.2 * torch.randn(1, 4, target.d_out)
            )
            for target in targets
        }
        write_lora(tmp_path / "loras" / name, pairs, base_path)
    out = tmp_path / "out"
    compress_loras(tmp_path / "loras", out, base_path, rank=12)
    loras = read_loras(tmp_path / "loras")

    def scores() -> Any:
        return compare(ROWS, loras, out, tmp_path / "work", rows=10)

    found = scores()
    assert set(found["by_lora"]) == set(names)
    assert found["same"] == 1
    assert found["original"] == found["compressed"]
    assert found["by_lora"]["wic_wn-0"] != found["by_lora"]["wic_wn-1"]

    routers = out / "routers"
    other = (routers / "wic_wn-1.safetensors").read_bytes()
    (routers / "wic_wn-0.safetensors").write_bytes(other)
    assert scores()["by_lora"]["wic_wn-0"]["same"] < 1


def test_folder_without_loras_is_an_error(tmp_path: Path, tiny_base: Path) -> None:
    done = polyrex(
        "compress", tmp_path, "--base", tiny_base, "--out", tmp_path / "out", "--rank", 2
    )
    assert done.exit_code == 2
    assert "none of its folders holds an adapter_config.json" in done.output
