"""Requests routed by what they say: T-REX's intuition of the prompt itself, instead of a task's."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

from torch import Tensor

from polyrex.adapters.errors import PolyrexError
from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.registry import TaskInfo, TaskVersion
from polyrex.adapters.files.router import Router, RouterMetadata
from polyrex.adapters.model.sentence_encoder import SentenceEncoder
from polyrex.server.errors import StartError

NAME = ":prompt"
"""What responses call the routing of a request that was routed so; no task can be named so."""


class PromptIntuition:
    """Makes a router of every prompt, from its sentence embedding. May be called in any thread."""

    def __init__(self, inventory: Inventory, encoder: SentenceEncoder) -> None:
        """`encoder` is the one that the inventory's centroids belong to."""
        assert inventory.intuition is not None
        self._intuition = inventory.intuition
        self._inventory = inventory
        self._encoder = encoder

    def versions(self, texts: Sequence[str]) -> list[TaskVersion]:
        """The routing of each text, as a task version that is in no registry."""
        cosines = self._intuition.of(self._encoder.embed(texts))  # [n, K]
        return [self._version(row.unsqueeze(0).clone()) for row in cosines]

    def _version(self, logits: Tensor) -> TaskVersion:
        digest = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
        router = Router(logits, RouterMetadata(self._inventory.sha256, NAME), digest)
        size = 4 * logits.numel()
        return TaskVersion(TaskInfo(NAME, 1, digest, size, time.time(), "", {}, {}), router)


def prompt_intuition(inventory: Inventory) -> PromptIntuition | None:
    """What the inventory needs to route prompts, or None where it has no intuition.

    Raises StartError where its sentence encoder cannot be loaded, or is another.
    """
    if inventory.intuition is None:
        return None
    try:
        encoder = SentenceEncoder.of(inventory.intuition.encoder)
    except PolyrexError as error:
        raise StartError(f"{inventory.path}: {error}") from error
    return PromptIntuition(inventory, encoder)
