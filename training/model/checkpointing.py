"""Gradient checkpointing: a decoder layer keeps its input, and runs again for its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from polyrex.adapters.errors import SpecError
from polyrex.adapters.model.routed_linear import Addition, RoutedLinear

Added = Sequence[tuple[RoutedLinear, Addition | None]]
"""Routed layers, with what each adds."""


def checkpoint_layers(base: nn.Module) -> None:
    """From now on, every layer of the model runs again for its gradients, where any are wanted.

    The second run adds what the first one added, whatever the routed layers add by then: routing
    is over before the backward pass begins. Layers are those that transformers would checkpoint
    itself, which it does in training mode alone, where layers drop values at random.

    Raises SpecError if the model has none.
    """
    layers = [each for each in base.modules() if isinstance(each, GradientCheckpointingLayer)]
    if not layers:
        raise SpecError(
            f"{type(base).__name__} has no layers that gradients can be checkpointed in"
        )
    for layer in layers:
        layer.forward = _twice(layer, layer.forward)


def _twice(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        routed = [each for each in layer.modules() if isinstance(each, RoutedLinear)]
        added = [(each, each.added) for each in routed]

        def again(*args: Any, **kwargs: Any) -> Any:
            with _adding(added):
                return forward(*args, **kwargs)

        # Nothing in a frozen model is drawn at random, so there is no state to bring back.
        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


@contextmanager
def _adding(added: Added) -> Iterator[None]:
    """Within this context, the routed layers add this; behind it, what they added before."""
    before = [(layer, layer.added) for layer, _ in added]
    for layer, each in added:
        layer.added = each
    try:
        yield
    finally:
        for layer, each in before:
            layer.added = each
