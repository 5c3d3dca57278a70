"""vLLM's own Triton kernels for batched LoRA, from its Python files alone.

`make gpu-bundle` copies the files; where vLLM is installed, they are taken from there. They are run
unchanged, with stand-ins for the modules of vLLM that they import: vLLM itself, which would load
its compiled library and look for a platform, is not imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

OPS = "vllm.lora.ops.triton_ops"
FILES = (
    "kernel_utils.py",
    "lora_expand_op.py",
    "lora_kernel_metadata.py",
    "lora_shrink_op.py",
    "utils.py",
)
"""What the shrink and the expand import of their own folder."""


def files_folder(bundle: Path) -> Path | None:
    """Where the files lie: in the bundle, or in an installed vLLM; None where they are not."""
    installed = importlib.util.find_spec("vllm")
    places = [bundle / "vllm_lora"]
    if installed is not None and installed.origin is not None:
        places.append(Path(installed.origin).parent.joinpath(*OPS.split(".")[1:]))
    return next((place for place in places if (place / FILES[0]).exists()), None)


class _Logger(logging.Logger):
    """vLLM's loggers have two more methods."""

    def warning_once(self, *_: object) -> None:
        """Say nothing: the kernels' default configuration is meant."""

    info_once = warning_once


class _Platform:
    """What the files ask of vLLM's current platform."""

    @staticmethod
    def is_cuda() -> bool:
        return torch.cuda.is_available()

    @staticmethod
    def has_device_capability(least: int) -> bool:
        return torch.cuda.get_device_capability() >= divmod(least, 10)


def _to_device(values: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def _register_nothing(**_: object) -> None:
    """Raise what makes the files fall back to the plain functions, without a torch operator."""
    raise AttributeError


def _stand_ins(folder: Path) -> dict[str, dict[str, Any]]:
    """The modules that the files import, each with the names that they read."""
    import triton
    import triton.language

    package: dict[str, Any] = {"__path__": []}
    return {
        "vllm": package,
        "vllm.envs": {
            "VLLM_BATCH_INVARIANT": False,
            "VLLM_TUNED_CONFIG_FOLDER": None,
            "VLLM_LORA_ENABLE_DUAL_STREAM": False,
            "VLLM_LORA_DISABLE_PDL": False,
        },
        "vllm.logger": {"init_logger": _Logger},
        "vllm.platforms": {"current_platform": _Platform},
        "vllm.triton_utils": {"triton": triton, "tl": triton.language},
        "vllm.utils": package,
        "vllm.utils.math_utils": {"next_power_of_2": triton.next_power_of_2},
        "vllm.utils.torch_utils": {
            "async_tensor_h2d": _to_device,
            "direct_register_custom_op": _register_nothing,
        },
        "vllm.lora": package,
        "vllm.lora.ops": package,
        OPS: {"__path__": [str(folder)]},
    }


@dataclass(frozen=True)
class VllmKernels:
    """vLLM's shrink and expand, and the class of what tells them which token has which LoRA."""

    shrink: Any
    expand: Any
    metadata: Any
    addresses: tuple[dict[Any, Any], ...]
    """vLLM's own caches, of what it knows of the weights at an address."""

    @classmethod
    def load(cls, folder: Path) -> VllmKernels:
        """Import the files; from then on, this process cannot import vLLM itself."""
        for name, values in _stand_ins(folder).items():
            module = ModuleType(name)
            vars(module).update(values)
            sys.modules[name] = module
            parent, _, own = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], own, module)
        names = "lora_shrink_op", "lora_expand_op", "lora_kernel_metadata", "utils"
        shrink, expand, metadata, cached = (
            importlib.import_module(f"{OPS}.{name}") for name in names
        )
        return cls(
            shrink.lora_shrink,
            expand.lora_expand,
            metadata.LoRAKernelMeta,
            (cached._LORA_A_PTR_DICT, cached._LORA_B_PTR_DICT),
        )

    def forget(self) -> None:
        """Forget all weights: others may lie at their addresses from now on."""
        for known in self.addresses:
            known.clear()


class VllmLora:
    """A layer's LoRAs on vLLM's kernels: module m of task s has a[m][s] and b[m][s].

    `a` [D, r, d_in] and `b` [D, d_out, r] a module, whose outputs lie side by side; `rows` [T] is
    the task of each token. Launches are as small as vLLM allows: for the tasks that occur.
    """

    def __init__(
        self, kernels: VllmKernels, a: list[Tensor], b: list[Tensor], rows: Tensor
    ) -> None:
        self._kernels, self._a, self._b = kernels, a, b
        meta = kernels.metadata.make(len(a[0]), len(rows), rows.device)
        meta.prepare_tensors(rows.to(torch.int32))
        self._meta = meta.meta_args(len(rows), True)
        self._h = torch.empty(len(a), len(rows), a[0].shape[1], device=rows.device)

    def add_(self, y: Tensor, x: Tensor) -> None:
        """Add the LoRAs' part for x [T, d_in] to y [T, d], in place."""
        self._kernels.shrink(x, self._a, self._h, *self._meta, 1.0)
        self._kernels.expand(self._h, self._b, y, *self._meta, offset_start=0, add_inputs=True)
