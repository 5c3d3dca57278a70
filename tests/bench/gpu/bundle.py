"""`make gpu-bundle`: collects what `make gpu` needs beyond torch, triton and transformers.

    python -m bench.gpu.bundle --out build/gpu-bundle

The folder then holds wheels, which are unpacked where a machine lacks the package; the Python
files of vLLM's LoRA kernels, unchanged; and the small base model in pieces that can be carried one
by one. It ends with a list of sizes, and of the parts that need each. This command needs the
network; the machine with the GPU does not.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.gpu.base_pieces import PACKAGE, write_pieces
from bench.gpu.subjects.vllm_lora import FILES, files_folder
from bench.gpu.workspace import ROOT

PYTHON = "3.12"
"""Of the machine with the GPU. Only wheels that any newer Python can use are collected."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
WHEELS = {
    "all": "attrs cyclopts docstring_parser markdown-it-py mdurl psutil pygments rich rich_rst",
    "tests": "execnet iniconfig pluggy pytest pytest-xdist",
    "training": "accelerate peft",
    "study": "gguf",
}
"""Packages without their dependencies, by the parts that need them."""


def download(folder: Path) -> Iterator[tuple[str, Path]]:
    """Download every wheel; yields the parts that need it, and its path."""
    options = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--quiet"]
    options += ["--implementation", "cp", *(f"--platform={name}" for name in PLATFORMS)]
    options += ["--constraint", str(ROOT / ".ci" / "constraints.txt")]
    for parts, names in WHEELS.items():
        own = folder / parts.replace(" ", "-")
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options]
        subprocess.run([*command, "--dest", str(own), *names.split()], check=True)
        for wheel in sorted(own.glob("*.whl")):
            yield parts, wheel.rename(folder / wheel.name)
        own.rmdir()


def copy_vllm(bundle: Path) -> Iterator[tuple[str, Path]]:
    """Copy the files of vLLM's kernels, where vLLM is installed."""
    source, target = files_folder(Path()), bundle / "vllm_lora"
    if source is None:
        return
    target.mkdir()
    for name in FILES:
        yield "kernels, for vLLM's figures", Path(shutil.copy(source / name, target))


def cut_base(bundle: Path) -> Iterator[tuple[str, Path]]:
    """Cut the base model, where its package is installed."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        return
    for piece in write_pieces(next(Path(package.origin).parent.glob("*.gguf")), bundle):
        yield "study", piece
    yield "study", bundle / "base" / "whole.json"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder, emptied first")
    bundle = parser.parse_args().out
    if bundle.exists():
        shutil.rmtree(bundle)
    (bundle / "wheels").mkdir(parents=True)
    found = [*download(bundle / "wheels"), *copy_vllm(bundle), *cut_base(bundle)]
    lines = ["| file | megabytes | needed by |", "|---|---:|---|"]
    for parts, path in found:
        size = path.stat().st_size / 1e6
        lines.append(f"| {path.relative_to(bundle)} | {size:.2f} | {parts} |")
    lines.append(f"| all | {sum(path.stat().st_size for _, path in found) / 1e6:.2f} | |")
    (bundle / "README.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
