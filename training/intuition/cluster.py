"""Where T-REX's intuition comes from: embeddings of the training texts, and their centroids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import load_file, save
from scipy.cluster.vq import kmeans2
from torch import Tensor

from polyrex.adapters.errors import DataError
from polyrex.adapters.files.tensor_file import write_atomic
from polyrex.adapters.model.intuition import EncoderIdentity, Intuition, gates_of
from polyrex.adapters.model.sentence_encoder import SentenceEncoder
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.data.batches import Example, by_length
from polyrex.training.data.tasks import Task, prompt_of

CENTROIDS = 32
"""As in the paper."""


class Embeddings:
    """Embeddings of texts, computed once and kept on disk."""

    def __init__(self, encoder: SentenceEncoder, folder: Path) -> None:
        self.encoder = encoder
        self._identity = encoder.identity
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def of(self, name: str, texts: Sequence[str]) -> Tensor:
        """Unit vectors [n, D] of n texts; `name` begins the name of the file for them."""
        key = hashlib.sha256(json.dumps([self._identity, *texts]).encode()).hexdigest()[:16]
        path = self._folder / f"{name}-{key}.safetensors"
        if not path.exists():
            write_atomic(path, save({"embeddings": self._compute(name, texts)}))
        return load_file(path)["embeddings"]

    def _compute(self, name: str, texts: Sequence[str]) -> Tensor:
        lengths = [len(text) for text in texts]
        batches = list(by_length(lengths, batch_tokens=8192))  # in characters
        order = torch.tensor([index for indices in batches for index in indices])
        parts = [
            self.encoder.embed([texts[i] for i in indices])
            for indices in track(batches, description=f"embedding: {name}")
        ]
        return torch.cat(parts)[order.argsort()].contiguous()


@dataclass(frozen=True)
class TrainPrompts:
    """A fresh intuition of tasks that are trained together, and their rows' own, [n, K] each."""

    intuition: Intuition
    own: list[Tensor]

    @classmethod
    def of(
        cls, embeddings: Embeddings, tasks: Sequence[Task], spec: AdapterSpec, *, seed: int
    ) -> TrainPrompts:
        """Of the train rows of tasks. Raises DataError where they are fewer than centroids."""
        embedded = [
            embeddings.of(task.name, [prompt_of(task.instruction, r) for r in task.rows["train"]])
            for task in tasks
        ]
        intuition = cluster(embeddings.encoder, torch.cat(embedded), spec, seed=seed)
        return cls(intuition, [intuition.of(each) for each in embedded])

    def given_to(self, examples: Sequence[Example]) -> list[Example]:
        """The examples of all these rows, in their order, routed one by one."""
        rows = torch.cat(self.own)
        return [replace(e, intuition=c) for e, c in zip(examples, rows, strict=True)]

    def means(self) -> Tensor:
        """The routers [tasks, 1, K] of the tasks."""
        return torch.stack([rows.mean(0, keepdim=True) for rows in self.own])


def cluster(
    encoder: SentenceEncoder, embeddings: Tensor, spec: AdapterSpec, *, seed: int = 0
) -> Intuition:
    """A fresh intuition: k-means centroids of the training texts' embeddings [n, D].

    Raises DataError where there are fewer texts than centroids.
    """
    count = spec.intuition or CENTROIDS
    if len(embeddings) < count:
        raise DataError(f"{count} centroids need as many texts, got {len(embeddings)}")
    centroids, _ = kmeans2(embeddings.numpy(), count, minit="++", rng=seed, missing="raise")
    identity = EncoderIdentity(encoder.name, embeddings.shape[1], encoder.identity)
    unit = F.normalize(torch.from_numpy(centroids).float(), dim=-1)
    intuition = Intuition(unit, identity, gates_of(spec))
    intuition.reset(torch.Generator().manual_seed(seed))
    return intuition
