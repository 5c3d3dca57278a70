"""The card of these tests (support/placement.py), and what its layers run on.

Triton's kernels run in a process of its own, under Triton's interpreter, as in tests/kernels/gpu.
Elsewhere layers run on PyTorch's operators.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from polyrex.adapters.serving import backends
from support.card_operators import CardTensor, Misplaced
from support.placement import Card


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    card = Card()
    if os.environ.get("TRITON_INTERPRET") == "1":
        run_kernels(card, monkeypatch)
    else:
        monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with card:
        yield card


def run_kernels(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter run kernels on the card's tensors, and refuse all others."""
    from triton.runtime.interpreter import GridExecutor

    interpret = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        given = [*tree_leaves((args, kwargs)), self.grid]
        name = self.fn.__name__
        if any(isinstance(t, torch.Tensor) and not isinstance(t, CardTensor) for t in given):
            raise Misplaced(f"{name}: a kernel on a tensor of the CPU")
        card.launched(name, given, ())
        plain = tree_map_only(CardTensor, lambda t: t.numbers, (args, kwargs))
        interpret(self, *plain[0], **plain[1])

    monkeypatch.setattr(GridExecutor, "__call__", launch)
