"""The frozen layers below the first adapter: what they make of a text is computed once.

With adapters on the upper part of a model, everything below them is the same in every step, for
every method and every seed. `LowerLayers` computes it once and keeps it on disk; `cut` takes those
layers out of the model, which then begins at their hidden states.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import load_file, save
from torch import Tensor, nn

from polyrex.adapters.base_model import identify
from polyrex.adapters.files import write_atomic

from .batches import Example, by_length
from .questions import Question, model_inputs


class LowerLayers:
    """The first `layers` decoder layers of a base model, and what they made of texts so far.

    Decoder layers are `base.base_model.layers`, as in Llama and its many relatives.
    """

    def __init__(self, base: nn.Module, layers: int, folder: Path) -> None:
        self._base = base
        self._layers = layers
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def of_questions(self, name: str, questions: Sequence[Question]) -> list[Question]:
        """The questions with their hidden states; `name` begins the name of the file for them."""
        found = self._hidden(name, questions)
        return [replace(q, hidden=hidden) for q, hidden in zip(questions, found, strict=True)]

    def of_examples(self, name: str, examples: Sequence[Example]) -> list[Example]:
        """The examples with their hidden states."""
        questions = [Question(example.prompt, (example.answer,)) for example in examples]
        found = self._hidden(name, questions)
        return [replace(e, hidden=hidden) for e, hidden in zip(examples, found, strict=True)]

    def _hidden(self, name: str, questions: Sequence[Question]) -> Sequence[Tensor]:
        path = self._folder / f"{name}-{self._key(questions)}.safetensors"
        if not path.exists():
            write_atomic(path, save({"hidden": torch.cat(self._compute(name, questions))}))
        # The file is mapped into memory, and shared with whoever else reads it.
        return torch.split(load_file(path)["hidden"], [len(question) for question in questions])

    def _key(self, questions: Sequence[Question]) -> str:
        base: Any = self._base
        content = [
            asdict(identify(base)),
            str(base.dtype),
            self._layers,
            [[q.prompt, q.options] for q in questions],
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @torch.inference_mode()
    def _compute(self, name: str, questions: Sequence[Question]) -> list[Tensor]:
        base: Any = self._base
        assert len(base.base_model.layers) == base.config.num_hidden_layers, "it was cut"
        caught: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            caught.append(args[0])
            raise _Reached

        found = [torch.empty(0)] * len(questions)
        batches = list(by_length([len(q) for q in questions], batch_tokens=4096))
        handle = base.base_model.layers[self._layers].register_forward_pre_hook(stop)
        try:
            for indices in track(batches, description=f"lower layers: {name}"):
                batch = [questions[i] for i in indices]
                with suppress(_Reached):
                    base.base_model(**model_inputs(batch, base.dtype))
                for index, hidden in zip(indices, caught.pop(), strict=True):
                    found[index] = hidden[: len(questions[index])].clone()
        finally:
            handle.remove()
        return found


class _Reached(Exception):
    """The pass has come to the first layer that is not needed."""


def cut(base: nn.Module, layers: int) -> None:
    """Take the first `layers` decoder layers out of a model, once its adapters are attached.

    From then on it takes hidden states (`inputs_embeds`) instead of tokens.
    """
    model: Any = base.base_model
    model.layers = model.layers[layers:]
