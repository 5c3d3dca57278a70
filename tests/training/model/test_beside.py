"""A second copy of the base model, beside an engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyrex.adapters.errors import DeviceError
from polyrex.adapters.model.base_model import load_base
from polyrex.training.model import beside
from polyrex.training.model.beside import OVERHEAD, RESERVE, device_beside, weight_bytes

CARD, CPU = torch.device("cuda", 0), torch.device("cpu")
TOTAL = 80 << 30


@pytest.fixture
def capped(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A machine with a card; the share of it that this process has been allowed."""
    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, _: shares.append(share)
    )
    return shares


@pytest.mark.parametrize("spare", [0, -1], ids=["enough", "a byte too little"])
def test_card_serves_where_the_engine_keeps_its_reserve(
    tiny_base: Path, capped: list[float], monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    base = str(tiny_base)
    free = weight_bytes(base, torch.bfloat16) + OVERHEAD + RESERVE + spare
    monkeypatch.setattr(beside, "_memory", lambda _: (free, TOTAL))
    if spare < 0:
        assert device_beside("auto", base, torch.bfloat16) == CPU
        with pytest.raises(DeviceError, match=r"fitting takes 2\.2 GB and leaves 4\.3 GB to the"):
            device_beside("cuda", base, torch.bfloat16)
    else:
        assert device_beside("auto", base, torch.bfloat16) == CARD
        assert device_beside("cuda", base, torch.bfloat16) == CARD
    assert capped == ([] if spare < 0 else 2 * [(free - RESERVE) / TOTAL])


@pytest.mark.usefixtures("capped")
def test_card_that_cannot_even_be_asked_is_full(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: torch.device) -> tuple[int, int]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    assert device_beside("auto", str(tiny_base), torch.bfloat16) == CPU


def test_weights_are_counted_without_loading_them(tiny_base: Path) -> None:
    model = load_base(str(tiny_base), torch.float32)
    assert weight_bytes(str(tiny_base), torch.float32) == sum(p.nbytes for p in model.parameters())
