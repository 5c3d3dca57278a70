"""What serving needs is loaded in order, and what is not there is said first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyrex.adapters.errors import DeviceError
from polyrex.server.config import Device, Launch, ServerConfig
from polyrex.server.errors import StartError
from polyrex.server.launch.loading import load
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
