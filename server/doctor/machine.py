"""Checks of the machine: compiler, processor, cores, GPU, memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import torch

from polyrex.kernels.cpu.build import why_not_compiled
from polyrex.kernels.cpu.threads import cgroup_cores
from polyrex.server.config import Device, EngineName, Launch
from polyrex.server.engines.vllm.version import find_build

from .finding import Finding, Status

_CGROUP = Path("/sys/fs/cgroup")
_FEATURES = {"AMX": "amx_bf16", "AVX-512": "avx512f", "AVX2": "avx2"}


def runs_on(launch: Launch) -> torch.device:
    """The device that the engine will run on."""
    if launch.device is not Device.auto:
        return torch.device(launch.device)
    if launch.engine is EngineName.vllm and (build := find_build()):
        return torch.device(build.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compiler(launch: Launch) -> Finding:
    """The C++ compiler, and the CPU operators that it builds."""
    name = os.environ.get("CXX", "c++")
    path = shutil.which(name)
    found = f"{name}: not found" if path is None else f"{path}: {_first_line(path, '--version')}"
    reason = why_not_compiled()
    if reason is None:
        effect = "the CPU operators are built and loaded"
        return Finding("C++ compiler", Status.ok, found, effect)
    effect = f"{reason}; PyTorch's own operators run instead, more slowly"
    if runs_on(launch).type != "cpu":
        effect = f"{reason}; they are not needed on {runs_on(launch).type}"
    advice = "install g++ (or clang++) with OpenMP, or let CXX name one"
    return Finding("C++ compiler", Status.note, found, effect, advice)


def processor(launch: Launch) -> Finding:
    """The instructions that matrix products on the CPU can use."""
    flags = _cpu_flags()
    there = [name for name, flag in _FEATURES.items() if flag in flags]
    lacking = [name for name in _FEATURES if name not in there]
    found = f"has {', '.join(there) or 'none of them'}"
    if lacking:
        found += f"; lacks {', '.join(lacking)}"
    if runs_on(launch).type != "cpu":
        return Finding("Processor", Status.ok, found, f"the model runs on {runs_on(launch).type}")
    if "AMX" in there:
        effect = "bfloat16 products run on AMX; --dtype bfloat16 is the faster choice"
        return Finding("Processor", Status.ok, found, effect)
    if "AVX2" in there:
        effect = "products run on vector units; without AMX, float32 is often the faster dtype"
        return Finding("Processor", Status.ok, found, effect)
    effect = "products run without wide vector units, slowly"
    advice = "use a processor with AVX2 or newer, or a GPU"
    return Finding("Processor", Status.note, found, effect, advice)


def cores(_launch: Launch) -> Finding:
    """The cores that this process may use."""
    allowed = len(os.sched_getaffinity(0))
    quota = cgroup_cores()
    threads = torch.get_num_threads()
    found = f"{allowed} by affinity, " + (
        "no cgroup quota" if quota is None else f"{quota:.3g} by cgroup quota"
    )
    granted = allowed if quota is None else min(allowed, quota)
    effect = f"PyTorch computes with {threads} thread{'s' if threads != 1 else ''}"
    if threads > max(1, granted):
        advice = f"set OMP_NUM_THREADS={max(1, int(granted))}: threads beyond the quota wait"
        return Finding("Cores", Status.note, found, effect, advice)
    return Finding("Cores", Status.ok, found, effect)


def gpu(launch: Launch) -> Finding:
    """CUDA, and Triton for the kernels that run on it."""
    triton = "Triton installed" if find_spec("triton") else "Triton not installed"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        memory = torch.cuda.get_device_properties(0).total_memory
        found = f"{name}, {memory / 1e9:.3g} GB; {triton}"
        if find_spec("triton"):
            return Finding("GPU", Status.ok, found, "adapters run on the Triton kernels")
        effect = "adapters run on PyTorch's own operators, more slowly"
        return Finding("GPU", Status.note, found, effect, "pip install triton")
    found = f"no CUDA device; {triton}"
    if launch.device is Device.cuda:
        advice = "install a CUDA build of PyTorch and the driver, or serve with --device cpu"
        return Finding("GPU", Status.missing, found, "--device cuda cannot start", advice)
    return Finding("GPU", Status.ok, found, "the model runs on the CPU")


def free_memory(device: torch.device) -> int:
    """Bytes that a new process can have on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0
    free = _available()
    limit, used = _number("memory.max"), _number("memory.current")
    return free if limit is None or used is None else min(free, limit - used)


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 0


def _number(name: str) -> int | None:
    words = _words(_CGROUP / name)
    return int(words[0]) if words and words[0] != "max" else None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(flags.partition(":")[2].split())


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return next(iter(done.stdout.splitlines()), "")
