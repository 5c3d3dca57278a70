"""The environment that the engine's process gets."""

from __future__ import annotations

from collections.abc import Mapping

from polyrex.kernels.cpu.threads import thread_variables

ENGINE_HOST = "POLYREX_ENGINE_HOST"
"""Set in the engine's process and in all that it starts, which then end with their parents."""

_VLLM = {
    "VLLM_HOST_IP": "127.0.0.1",  # its processes talk to each other on this machine alone
    "VLLM_NO_USAGE_STATS": "1",  # it would send them to its makers
}
_FORBIDDEN = ("VLLM_ALLOW_INSECURE_SERIALIZATION",)  # pickled functions between its processes


def host_environment(server: Mapping[str, str]) -> dict[str, str]:
    """The variables of the engine's process, from those of the server's.

    What a library reads when it is loaded (OpenMP's settings, say) is set here or nowhere.
    """
    kept = {name: value for name, value in server.items() if name not in _FORBIDDEN}
    return {**kept, **thread_variables(server), **_VLLM, ENGINE_HOST: "1"}
