"""Base models that cannot be trained on say why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polyrex.adapters.errors import FileError
from polyrex.training.model.loading import load_for_training
from support.reliability.small_base import SmallBase


def test_a_tokenizer_without_an_end_is_told_of(tmp_path: Path) -> None:
    base = Path(SmallBase.write(tmp_path).base)
    path = base / "tokenizer_config.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps({**known, "eos_token": None}))
    with pytest.raises(FileError, match="names no eos_token"):
        load_for_training(str(base), "float32")
