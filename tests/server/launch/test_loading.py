"""What serving needs is loaded in order, and what is not there is said first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyrex.adapters.errors import DeviceError
from polyrex.adapters.files.bundle import Bundle
from polyrex.server.config import Device, Launch, RegistryConfig, ServerConfig
from polyrex.server.errors import StartError
from polyrex.server.launch import loading
from polyrex.server.launch.loading import load, open_registry, shipped_inventory
from polyrex.server.launch.progress import Progress


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_card_that_is_not_there_is_reported_before_anything_is_read() -> None:
    launch = Launch(device=Device.cuda, inventory=Path("no such file"))
    with pytest.raises(DeviceError, match="device cuda: expected"):
        load(launch, Progress())


def test_a_folder_for_adapters_that_is_not_there_is_reported(tmp_path: Path) -> None:
    server = ServerConfig(lora_dir=tmp_path / "nowhere")
    with pytest.raises(StartError, match=r"--lora-dir .*nowhere: there is no such folder"):
        load(Launch(server, tmp_path), Progress())


def test_a_registry_that_cannot_be_filled_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.read(shipped_inventory("smollm2-135m-instruct"))

    def fail(*_: object) -> None:
        raise StartError("an old file is damaged")

    with monkeypatch.context() as patch:
        patch.setattr(loading, "take_over", fail)
        with pytest.raises(StartError, match="damaged"):
            open_registry(RegistryConfig(), tmp_path, bundle)
    open_registry(RegistryConfig(), tmp_path, bundle).close()  # SQLite lets one server in
