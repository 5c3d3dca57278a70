"""T-REX's intuition: a text's sentence embedding says which experts the text needs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class EncoderIdentity:
    """The sentence encoder in whose space an inventory's centroids lie."""

    name: str
    dimension: int
    sha256: str  # of its weights


class Intuition(nn.Module):
    """K centroids of the training texts, and the learned map from them to a module's gates.

    A text's intuition is `c = centroids @ embedding`, [K], its cosines with the centroids (T-REX,
    section 3.3). Gates are a module's I * J pairs (or its I, in the diagonal form): `map @ c`.
    One map serves all modules.
    """

    def __init__(self, centroids: Tensor, encoder: EncoderIdentity, gates: int) -> None:
        super().__init__()
        self.register_buffer("centroids", centroids)
        self.encoder = encoder
        self.map = nn.Parameter(torch.empty(gates, len(centroids)))

    centroids: Tensor  # [K, D], unit rows

    def reset(self, generator: torch.Generator) -> None:
        """Set the map to the identity where the counts agree, as in the paper; else draw it."""
        if self.map.shape[0] == self.map.shape[1]:
            nn.init.eye_(self.map)
        else:
            nn.init.normal_(self.map, std=1 / math.sqrt(self.map.shape[1]), generator=generator)

    def of(self, embeddings: Tensor) -> Tensor:
        """The intuition [n, K] of texts, from their embeddings [n, D], and on their device."""
        return embeddings @ self.centroids.T.to(embeddings.device)

    def gates(self, intuition: Tensor) -> Tensor:
        """Gates [..., G] from intuition [..., K]."""
        return intuition @ self.map.T
