"""The shape of a base model, by its name or from its folder, without loading it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from polyrex.adapters.errors import PolyrexError
from polyrex.kernels.roofline.model_shapes import MODELS, ModelShape


class PlanError(PolyrexError):
    """A model or a device of which nothing is known."""


def model_shape(name: str) -> ModelShape:
    """The shape of a model known by name, or of a folder; nothing is asked of the network.

    Names may lack the owner, or say `-Instruct`. Raises PlanError.
    """
    if Path(name).exists():
        return _shape_in(name)
    known = {_plain(model): shape for model, shape in MODELS.items()}
    if _plain(name) not in known:
        raise unknown_name("model", name, MODELS, " or a folder with a config.json")
    return known[_plain(name)]


def _plain(name: str) -> str:
    return name.rpartition("/")[2].lower().replace("-instruct", "")


def _shape_in(folder: str) -> ModelShape:
    """From a config.json, held against the linear layers of the model that it makes."""
    from transformers import AutoConfig

    from polyrex.adapters.model.parameter_counts import base_targets

    try:
        modules = [(target.d_in, target.d_out) for target in base_targets(folder)]
        shape = _shape_of(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except PolyrexError as error:
        raise PlanError(f"--model: {error}") from error
    except AttributeError as error:
        raise PlanError(f"--model: {folder}: {error}") from error
    if sorted(shape.modules) != sorted(modules):
        raise PlanError(
            f"--model: {folder}: not a decoder of equal layers with projections"
            " q, k, v, o, gate, up, down"
        )
    return shape


def _shape_of(config: Any) -> ModelShape:
    heads = config.num_attention_heads
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        tied=config.tie_word_embeddings,
    )


def unknown_name(option: str, name: str, known: Iterable[str], otherwise: str = "") -> PlanError:
    """The error of a name that is not known; it lists the known ones, and the nearest."""
    near = difflib.get_close_matches(name, known, n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return PlanError(
        f"--{option}: no {option} {name!r}; there are {', '.join(known)}{otherwise}{hint}"
    )
