"""The batches and the report of the vLLM benchmark."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from bench.cases import MAIN, OTHERS, REQUESTS
from bench.harness import Comparison, Turns
from bench.vllm.report import read_document, write_report
from bench.vllm.rounds import popular
from bench.vllm.run import Part, comparisons, merged


def test_popularities() -> None:
    draw = random.Random(0)
    assert popular("none", 0, draw) == [None] * REQUESTS
    assert popular("identical", 9, draw) == [0] * REQUESTS
    assert popular("distinct", REQUESTS, draw) == list(range(REQUESTS))
    assert set(popular("uniform", 2, draw)) == {0, 1}
    zipf = popular("zipf", 10_000, draw)
    assert max(zipf.count(task) for task in zipf) == zipf.count(0) > 1
    assert set(zipf) <= set(range(10_000))


def every_turn(rate: float) -> Turns:
    """Every turn that ratios need, all at one rate."""
    names = ["base", "multilora distinct"]
    names += [f"{name} {popularity}" for name in MAIN for popularity in ("distinct", "identical")]
    return Turns({name: {turn: rate} for turn, name in enumerate(names)}, len(names))


def mode(eager: bool) -> Part:
    decode, prefill = every_turn(3.0), every_turn(4.0)
    figures: dict[str, Any] = {"decode": decode.medians(), "prefill": prefill.medians()}
    if eager:
        figures |= {"one_task": dict.fromkeys(MAIN, 0.9), "add_lora_ms_p50": 80.0}
    return Part.of(comparisons(decode, prefill, MAIN), figures)


def test_document_grows_by_parts(tmp_path: Path) -> None:
    document = read_document(tmp_path)
    document = merged(document, "eager", mode(True))
    write_report(document, tmp_path)
    assert read_document(tmp_path) == document
    assert "one_task_vs_base_min" not in document["ratios"]
    document = merged(document, "one_task", Part({}, dict.fromkeys(OTHERS, 0.8)))
    assert document["ratios"]["one_task_vs_base_min"] == 0.8
    for name in MAIN:
        assert document["ratios"][f"{name}_vs_multilora_distinct32"] == 1.0
    assert document["figures"]["eager"]["quartiles"]["prefill_vs_base_distinct32"] == [1.0, 1.0]
    document = merged(document, "compiled", mode(False))
    measured = {"base": 2e-3, "shared 32": 1e-4, "composed 32": 1e-3, "shared 8": 1e-4}
    predicted = {"base": 1e-3, "shared": 1e-4, "composed": 1e-3}
    layers = {"seconds": {"4096": measured}, "predicted": {"4096": predicted}}
    document = merged(document, "layers", Part({}, layers))
    rates = {"decode": {"base": 8.0, "idle": 7.0}}
    flat = Part.of({"idle_vs_base": Comparison(0.99, (0.9, 1.1))}, rates)
    document = merged(document, "flat", flat)
    write_report(document, tmp_path)
    table = (tmp_path / "bench_vllm.md").read_text()
    assert "| trex-mix | 0.8 |" in table
    assert "| idle_vs_base | 0.99 (0.9 to 1.1) |" in table
    assert "| idle | 7.0 |" in table
    assert "prefill, compiled" in table
    assert "| 4096 | 2 | 5% | 50% | 1 | 10% | 100% |" in table
    assert (tmp_path / "bench_vllm.png").stat().st_size > 0


def test_part_that_is_measured_again_replaces_what_it_gave(tmp_path: Path) -> None:
    first = merged(read_document(tmp_path), "layers", Part({"overhead": 0.1}, {"seconds": {}}))
    again = merged(first, "layers", Part({"overhead": 0.2}, {"seconds": {"a": {"b": 1.0}}}))
    assert again["ratios"] == {"overhead": 0.2}
    assert again["figures"]["layers"] == {"seconds": {"a": {"b": 1.0}}}
