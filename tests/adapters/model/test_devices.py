"""Names of devices, on machines with and without a card."""

from __future__ import annotations

import pytest
import torch

from polyrex.adapters.errors import DeviceError
from polyrex.adapters.model.devices import pick_device, send
from support.card_operators import CUDA, CardTensor
from support.placement import Card, HostSync


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two cards."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_card")
def test_auto_is_the_cpu_where_there_is_no_card() -> None:
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")


@pytest.mark.usefixtures("no_card")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_card_that_is_not_there_is_told_in_one_line(name: str) -> None:
    with pytest.raises(
        DeviceError, match=rf"^device {name}: expected CUDA device \d, but"
    ) as caught:
        pick_device(name)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("cards")
def test_auto_is_the_first_card() -> None:
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 0)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.usefixtures("cards")
def test_processes_of_torchrun_take_a_card_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(DeviceError, match="2 processes here, which need a card each"):
        pick_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(DeviceError, match="expected CUDA device 2, but this machine has 2"):
        pick_device("auto")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "meta", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(DeviceError, match="expected auto, cpu, cuda or cuda:N"):
        pick_device(name)


def test_the_host_waits_for_copies_to_it_alone() -> None:
    """One that it did not wait for could be read before it is there."""
    with Card() as card:
        with card.decode_step():
            tensor = send(torch.ones(3), CUDA)
        assert isinstance(tensor, CardTensor)
        with card.decode_step(), pytest.raises(HostSync):
            send(tensor, torch.device("cpu"))
