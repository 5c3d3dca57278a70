"""A tiny random Llama with the real tokenizer, and a handful of tasks, to train on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.files.inventory import write_inventory
from polyrex.adapters.model.attach import AdaptedModel, attach, find_targets
from polyrex.adapters.model.base_model import load_base
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.data.batches import Example, encode_rows
from polyrex.training.data.tasks import load_tasks
from support.small_model import random_llama

MakeAdapted = Callable[[AdapterSpec], AdaptedModel]

COLOURS = ("red", "blue", "green")
THINGS = ("brick", "sea", "leaf", "rose", "sky", "grass", "blood", "ocean")


@pytest.fixture(scope="session")
def tiny_base(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama of two layers, in Hugging Face's format, with a tokenizer."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    model = random_llama(
        48,
        80,
        len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        initializer_range=0.2,  # with 0.02, the logits of so narrow a model hardly differ
    )
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_adapted(tiny_base: Path) -> MakeAdapted:
    """Puts fresh adapters of a spec on a fresh copy of the tiny model, in float32."""

    def make(spec: AdapterSpec) -> AdaptedModel:
        model = load_base(str(tiny_base), torch.float32)
        return attach(model, spec, find_targets(model))

    return make


@pytest.fixture(scope="session")
def rows_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder: two held_in tasks, one with options and one without, and one held_out."""
    folder: Path = tmp_path_factory.mktemp("rows")
    (folder / "tasks").mkdir()
    tasks = {
        "colour": ("held_in", "rank_classification_accuracy", "Which colour is it?"),
        "shout": ("held_in", "exact_match", "Say it twice."),
        "other_colour": ("held_out", "rank_classification_accuracy", "Name the colour."),
    }
    for name, (_, metric, _) in tasks.items():
        lines = []
        for number, thing in enumerate(THINGS * 2):
            options = list(COLOURS) if metric == "rank_classification_accuracy" else None
            answer = COLOURS[number % 3] if options else f"{thing} {thing}"
            split = ("train", "train", "valid", "test")[number % 4]
            row = {"split": split, "input": thing, "answer": answer, "options": options}
            lines.append(json.dumps(row))
        (folder / "tasks" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    manifest = [
        {"task": name, "role": role, "metric": metric, "instruction": instruction}
        for name, (role, metric, instruction) in tasks.items()
    ]
    (folder / "manifest.json").write_text(json.dumps({"tasks": manifest}))
    return folder


@pytest.fixture
def tiny_inventory(make_adapted: MakeAdapted, tmp_path: Path) -> Path:
    """The file of a random Poly inventory of the tiny model; no routers lie beside it."""
    adapted = make_adapted(AdapterSpec("poly", rank=3, experts=4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted.layers:
            layer.experts.get_parameter("lora_b").normal_(0, 0.1, generator=generator)
    write_inventory(tmp_path / "inventory.safetensors", adapted)
    return tmp_path / "inventory.safetensors"


@pytest.fixture
def examples(tokenizer: PreTrainedTokenizerBase, rows_folder: Path) -> list[Example]:
    """The train rows of the two held_in tasks."""
    return [
        example
        for index, task in enumerate(load_tasks(rows_folder, role="held_in"))
        for example in encode_rows(tokenizer, task.instruction, task.rows["train"], task=index)
    ]
