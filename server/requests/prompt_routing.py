"""Routes a request by its own prompt: T-REX's intuition of the prompt instead of a task's."""

from __future__ import annotations

from collections.abc import Sequence

from polyrex.adapters.errors import PolyrexError
from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.task import TaskVersion
from polyrex.adapters.model.sentence_encoder import SentenceEncoder
from polyrex.server.errors import StartError

NAME = ":prompt"
"""The task name that responses show for such a request; no registered task can have it."""


class PromptIntuition:
    """Makes a router for each prompt from its sentence embedding. May be called in any thread."""

    def __init__(self, inventory: Inventory, encoder: SentenceEncoder) -> None:
        """`encoder` must be the one that embedded the inventory's centroids."""
        assert inventory.intuition is not None
        self._intuition = inventory.intuition
        self._inventory = inventory
        self._encoder = encoder

    def versions(self, texts: Sequence[str]) -> list[TaskVersion]:
        """The routing of each text, as a task version that is in no registry."""
        cosines = self._intuition.of(self._encoder.embed(texts))  # [n, K]
        return [
            TaskVersion.unregistered(self._inventory, NAME, row.unsqueeze(0)) for row in cosines
        ]


def prompt_intuition(inventory: Inventory) -> PromptIntuition | None:
    """Load the prompt routing of an inventory; None where the inventory has no intuition.

    Raises StartError where its sentence encoder cannot be loaded, or is not the one it names.
    """
    if inventory.intuition is None:
        return None
    try:
        encoder = SentenceEncoder.of(inventory.intuition.encoder)
    except PolyrexError as error:
        raise StartError(f"{inventory.path}: {error}") from error
    return PromptIntuition(inventory, encoder)
