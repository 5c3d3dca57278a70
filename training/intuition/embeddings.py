"""Sentence embeddings of texts, kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import load_file, save
from torch import Tensor

from polyrex.adapters.files.tensor_file import write_atomic
from polyrex.adapters.model.sentence_encoder import SentenceEncoder
from polyrex.adapters.rows import Row
from polyrex.training.data.batches import by_length
from polyrex.training.data.tasks import Task, prompt_of


class Embeddings:
    """Embeddings by one encoder, each computed once and then read from `folder`."""

    def __init__(self, encoder: SentenceEncoder, folder: Path) -> None:
        self.encoder = encoder
        self._identity = encoder.identity
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def of(self, name: str, texts: Sequence[str]) -> Tensor:
        """Unit vectors [n, D] of n texts; the name of their file begins with `name`."""
        key = hashlib.sha256(json.dumps([self._identity, *texts]).encode()).hexdigest()[:16]
        path = self._folder / f"{name}-{key}.safetensors"
        if not path.exists():
            write_atomic(path, save({"embeddings": self._compute(name, texts)}))
        return load_file(path)["embeddings"]

    def of_prompts(self, task: Task, part: str, rows: Sequence[Row]) -> Tensor:
        """Unit vectors [n, D] of the prompts of a task's rows; `part` is a name for these rows."""
        prompts = [prompt_of(task.instruction, row) for row in rows]
        return self.of(f"{task.name}-{part}", prompts)

    def _compute(self, name: str, texts: Sequence[str]) -> Tensor:
        lengths = [len(text) for text in texts]
        batches = list(by_length(lengths, batch_tokens=8192))  # in characters
        order = torch.tensor([index for indices in batches for index in indices])
        parts = [
            self.encoder.embed([texts[i] for i in indices])
            for indices in track(batches, description=f"embedding: {name}")
        ]
        return torch.cat(parts)[order.argsort()].contiguous()
