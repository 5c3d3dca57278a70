"""What Ray Serve is told of the server, by its settings, and a replica without Ray."""

from __future__ import annotations

import asyncio
import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from polyrex.server.config import Device, EngineName, Launch, VllmEngineConfig
from polyrex.server.errors import EngineStopped, StartError
from support.reliability.small_base import SmallBase

pytest.importorskip("ray", reason="Ray is not installed (pip install 'polyrex[ray]')")

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Ray's own
    from polyrex.server.ray_app import Replica, app, deployment_options, read_launch

URL = "postgresql://somebody@127.0.0.1/registry"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallBase:
    return SmallBase.write(tmp_path_factory.mktemp("small"))


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of a deployment that is as it should be."""
    for name in os.environ:
        if name.startswith("POLYREX_SERVE_") or name == "POLYREX_CONFIG":
            monkeypatch.delenv(name)
    return {"registry": {"url": URL}, "insecure": True}


@pytest.mark.parametrize("registry", [{}, {"url": "sqlite:////tmp/registry.db"}])
def test_replicas_do_not_share_a_file(settings: dict[str, Any], registry: dict[str, str]) -> None:
    with pytest.raises(StartError, match="replicas share one registry"):
        app(settings | {"registry": registry})


@pytest.mark.parametrize(
    "args",
    [
        {"registry": {"url": "postgresql://somebody:hidden@127.0.0.1/registry"}},
        {"registry": {"url": f"{URL}?password=hidden"}},
        {"registry": {"url": f"{URL}?sslpassword=hidden"}},
        {"registry.url": "postgresql://somebody:hidden@127.0.0.1/registry"},
    ],
)
def test_a_password_among_the_arguments_is_refused(
    settings: dict[str, Any], args: dict[str, Any]
) -> None:
    with pytest.raises(StartError, match="POLYREX_SERVE_REGISTRY_URL") as caught:
        app({"insecure": True} | args)
    assert "hidden" not in str(caught.value)


def test_a_password_in_the_environment_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "postgresql://somebody:hidden@127.0.0.1/registry"
    monkeypatch.setenv("POLYREX_SERVE_REGISTRY_URL", url)
    assert app({"insecure": True})
    assert read_launch({"insecure": True}).registry.url == url


def test_rays_proxies_may_be_reached_from_anywhere(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a key\n")
    with pytest.raises(StartError, match="no API key would be required"):
        app(settings | {"insecure": False})
    launch = read_launch(settings | {"insecure": False, "api_key_file": str(keys)})
    assert launch.server.api_key_digests == (hashlib.sha256(b"a key").digest(),)
    assert read_launch(settings).server.host == "0.0.0.0"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"port": 9000}, "host and port are Ray's"),
        ({"host": "127.0.0.2"}, "host and port are Ray's"),
        ({"embedded": {"slotz": 8}}, "Unknown option: --embedded.slotz"),
        ({"embedded": {"slots": "many"}}, "unable to convert"),
    ],
)
def test_a_wrong_setting_is_told(
    settings: dict[str, Any], wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(StartError, match=message):
        app(settings | wrong)


def test_arguments_come_before_the_environment_and_that_before_the_file(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "polyrex.toml"
    file.write_text("[serve.embedded]\nslots = 3\nmax_running = 3\nmax_batch_tokens = 3\n")
    monkeypatch.setenv("POLYREX_CONFIG", str(file))
    monkeypatch.setenv("POLYREX_SERVE_EMBEDDED_SLOTS", "4")
    monkeypatch.setenv("POLYREX_SERVE_EMBEDDED_MAX_RUNNING", "4")
    given = {"slots": 5, "cuda_graphs": False}
    launch = read_launch(settings | {"embedded": given, "allowed_hosts": ["a", "b"]})
    sizes = launch.embedded
    assert (sizes.slots, sizes.max_running, sizes.max_batch_tokens) == (5, 4, 3)
    assert (sizes.cuda_graphs, launch.server.allowed_hosts) == (False, ("a", "b"))


def test_ray_is_told_what_a_replica_takes() -> None:
    config = VllmEngineConfig(tensor_parallel=2, max_running=32)
    launch = Launch(engine=EngineName.vllm, device=Device.cuda, vllm=config)
    large, small = deployment_options(launch), deployment_options(Launch())
    assert large["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 2}
    assert small["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 0}
    assert large["autoscaling_config"].target_ongoing_requests == 32
    assert small["autoscaling_config"].max_replicas > small["autoscaling_config"].min_replicas > 0
    assert small["graceful_shutdown_timeout_s"] > Launch().server.drain_seconds
    assert small["max_ongoing_requests"] == Launch().server.max_in_flight


def test_a_replica_is_healthy_from_the_start_of_its_engine_to_its_end(
    settings: dict[str, Any], small: SmallBase, postgres_url: str, tmp_path: Path
) -> None:
    places = {"base": str(small.base), "inventory": str(small.inventory)}
    places |= {"tasks_dir": str(tmp_path)}
    replica = Replica(read_launch(settings | places | {"registry": {"url": postgres_url}}))
    served = replica.__serve_build_asgi_app__()

    async def live() -> bool:
        async with served.router.lifespan_context(served):
            first = asyncio.create_task(replica.check_health())
            await asyncio.sleep(0)
            waited = not first.done()
            await first
            await served.state.context.engine.stop()
            with pytest.raises(EngineStopped):
                await replica.check_health()
        return waited

    assert asyncio.run(live())
