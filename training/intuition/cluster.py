"""T-REX's intuition in training: centroids of the prompts, and the routing that they give rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from polyrex.adapters.errors import DataError
from polyrex.adapters.model.intuition import EncoderIdentity, Intuition
from polyrex.adapters.model.sentence_encoder import SentenceEncoder
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.data.batches import Example
from polyrex.training.data.questions import Question
from polyrex.training.data.tasks import Task

from .embeddings import Embeddings

CENTROIDS = 32
"""As in the paper."""

Prompted = TypeVar("Prompted", Example, Question)


@dataclass(frozen=True)
class TrainPrompts:
    """A fresh intuition for tasks that are trained together, made from their train prompts."""

    intuition: Intuition
    embedded: list[Tensor]  # the train prompts of each task, [n, D]

    @classmethod
    def of(
        cls, embeddings: Embeddings, tasks: Sequence[Task], spec: AdapterSpec, *, seed: int
    ) -> TrainPrompts:
        """Embed and cluster the train prompts; raises DataError if there are too few of them."""
        embedded = [embeddings.of_prompts(task, "train", task.rows["train"]) for task in tasks]
        intuition = cluster(embeddings.encoder, torch.cat(embedded), spec, seed=seed)
        return cls(intuition, embedded)

    def route(self, examples: Sequence[Example]) -> list[Example]:
        """The examples of all these rows, in the same order, each routed by its own prompt."""
        own = torch.cat([self.intuition.of(each) for each in self.embedded])
        return routed_by_prompt(examples, own)

    def routers(self) -> Tensor:
        """The routers of the tasks, [tasks, 1, K]."""
        return torch.stack([mean_intuition(self.intuition, each) for each in self.embedded])


def routed_by_prompt(prompted: Sequence[Prompted], intuition: Iterable[Tensor]) -> list[Prompted]:
    """Examples or questions, each routed by its prompt's intuition [K]."""
    return [replace(each, intuition=own) for each, own in zip(prompted, intuition, strict=True)]


def mean_intuition(intuition: Intuition, embeddings: Tensor) -> Tensor:
    """The router [1, K] of a task: the mean intuition of its prompts, from their embeddings."""
    return intuition.of(embeddings).mean(0, keepdim=True)


def cluster(
    encoder: SentenceEncoder, embeddings: Tensor, spec: AdapterSpec, *, seed: int = 0
) -> Intuition:
    """A fresh intuition whose centroids are the k-means centroids of embeddings [n, D].

    Raises DataError if there are fewer embeddings than centroids.
    """
    from scipy.cluster.vq import kmeans2  # only training an intuition needs scipy

    count = spec.intuition or CENTROIDS
    if len(embeddings) < count:
        raise DataError(f"{count} centroids need as many texts, got {len(embeddings)}")
    centroids, _ = kmeans2(embeddings.numpy(), count, minit="++", rng=seed, missing="raise")
    identity = EncoderIdentity(encoder.name, embeddings.shape[1], encoder.identity)
    unit = F.normalize(torch.from_numpy(centroids).float(), dim=-1)
    intuition = Intuition(unit, identity, spec.gates)
    intuition.reset(torch.Generator().manual_seed(seed))
    return intuition
