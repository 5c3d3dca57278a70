"""A base model that brings code of its own: the code is not run, whatever the model is called."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polyrex.adapters.errors import FileError
from polyrex.adapters.model.base_model import load_base, load_tokenizer
from polyrex.adapters.model.parameter_counts import base_targets
from support.reliability.small_base import SmallBase

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): model_type = {kind!r}
class Model(LlamaForCausalLM): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""
MAP = {
    "AutoConfig": "theirs.Config",
    "AutoModelForCausalLM": "theirs.Model",
    "AutoTokenizer": [None, "theirs.Tokenizer"],
}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that is there once the model's own code has run."""
    return tmp_path / "marker"


def with_code(base: Path, marker: Path, kind: str) -> Path:
    """Give a model a file of code, and let its configuration ask for it."""
    (base / "theirs.py").write_text(CODE.format(marker=str(marker), kind=kind))
    changes = {"model_type": kind, "auto_map": MAP}
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((base / name).read_text())
        if name == "tokenizer_config.json":
            settings["tokenizer_class"] = "Tokenizer"
        (base / name).write_text(json.dumps(settings | changes))
    return base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return SmallBase.write(tmp_path).base


LOADS: dict[str, Callable[[str], Any]] = {
    "model": lambda path: load_base(path, torch.float32),
    "targets": base_targets,
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
def test_a_model_of_an_unknown_kind_is_refused_and_its_code_is_not_run(
    base: Path, marker: Path, load: Callable[[str], Any]
) -> None:
    with pytest.raises(FileError, match="custom code"):
        load(str(with_code(base, marker, "theirs")))
    assert not marker.exists()


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
def test_a_model_of_a_known_kind_is_loaded_without_its_code(
    base: Path, marker: Path, load: Callable[[str], Any]
) -> None:
    assert load(str(with_code(base, marker, "llama"))) is not None
    assert not marker.exists()


def test_a_tokenizers_code_is_not_run(base: Path, marker: Path) -> None:
    path = str(with_code(base, marker, "theirs"))
    with pytest.raises(FileError, match="custom code"):
        load_tokenizer(path)
    assert not marker.exists()
