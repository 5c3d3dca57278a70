"""The variables that the engine's process gets."""

from __future__ import annotations

from polyrex.server.engines.process.environment import ENGINE_HOST, host_environment


def test_vllm_keeps_to_itself() -> None:
    server = {"PATH": "/bin", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_HOST_IP": "0.0.0.0"}
    found = host_environment(server)
    assert found.items() >= {"PATH": "/bin", "VLLM_HOST_IP": "127.0.0.1", ENGINE_HOST: "1"}.items()
    assert found["VLLM_NO_USAGE_STATS"] == "1"
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in found


def test_threads_of_the_engine_spin_for_a_bounded_time() -> None:
    assert host_environment({})["GOMP_SPINCOUNT"] == "1000"
    assert host_environment({"GOMP_SPINCOUNT": "5"})["GOMP_SPINCOUNT"] == "5"
