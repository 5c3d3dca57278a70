"""vLLM's worker on CPUs, for an engine that compiles its model.

With LoRA enabled, vLLM 0.32 does not compile on CPUs, whatever mode is configured. Our layers can
be compiled: a compiler sees their adapters as one operator (layers.py). Only the worker reads the
mode, so it is enough to set it there.
"""

from __future__ import annotations

from typing import Any

from vllm.config import CompilationMode, VllmConfig
from vllm.v1.worker.cpu_worker import CPUWorker


class CompilingCpuWorker(CPUWorker):  # type: ignore[misc]
    """Compiles the model as vLLM does on CPUs without LoRA."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        vllm_config.compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE
        super().__init__(vllm_config, *args, **kwargs)
