"""Which CUDA graphs vLLM is told to capture, and that it pads steps as the plug-in expects."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

from polyrex.server.engines.vllm import engine
from polyrex.server.engines.vllm.layers import OPERATOR
from polyrex.server.engines.vllm.plugin import _largest_graph

SIZES = [1, 2, 4, 8, 16]


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(is_cuda=lambda: True, is_cpu=lambda: False)
    monkeypatch.setattr(engine, "current_platform", platform)


def configured(*, whole: bool) -> CompilationConfig:
    config: CompilationConfig = engine._graphs(False, whole)["compilation_config"]
    config.mode = CompilationMode.VLLM_COMPILE  # vLLM's default, as are sizes of its own choice
    config.cudagraph_capture_sizes, config.max_cudagraph_capture_size = SIZES, SIZES[-1]
    return config


def dispatcher(config: CompilationConfig) -> CudagraphDispatcher:
    lora = SimpleNamespace(max_loras=1023, specialize_active_lora=False)
    scheduler = SimpleNamespace(max_num_seqs=SIZES[-1])
    everything = SimpleNamespace(
        compilation_config=config,
        lora_config=lora,
        scheduler_config=scheduler,
        num_speculative_tokens=0,
    )
    found = CudagraphDispatcher(everything)
    found.initialize_cudagraph_keys(config.cudagraph_mode)
    return found


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("whole", [False, True])
def test_pieces_end_at_our_operator_and_at_attention(whole: bool) -> None:
    config = configured(whole=whole)
    assert f"vllm::{OPERATOR}" in (config.splitting_ops or ())
    assert config.is_attention_compiled_piecewise()
    assert config.cudagraph_mode.has_full_cudagraphs() == whole


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(
    ("whole", "decode", "mode"),
    [
        (True, True, CUDAGraphMode.FULL),
        (True, False, CUDAGraphMode.PIECEWISE),
        (False, True, CUDAGraphMode.PIECEWISE),
    ],
)
@pytest.mark.parametrize("adapters", [0, 1, 5, 1023])
def test_a_step_is_padded_no_further_than_the_largest_graph(
    whole: bool, decode: bool, mode: CUDAGraphMode, adapters: int
) -> None:
    config = configured(whole=whole)
    graphs = dispatcher(config)
    for tokens, padded in ((1, 1), (3, 4), (5, 8), (9, 16), (16, 16)):
        found, batch = graphs.dispatch(tokens, decode, adapters > 0, adapters)
        assert (found, batch.num_tokens, batch.has_lora) == (mode, padded, adapters > 0)
        assert batch.num_tokens <= _largest_graph(config)
    found, batch = graphs.dispatch(17, decode, adapters > 0, adapters)
    assert (found, batch.num_tokens) == (CUDAGraphMode.NONE, 17)


@pytest.mark.usefixtures("on_cuda")
def test_an_eager_engine_captures_nothing() -> None:
    assert engine._graphs(True, True) == {}
    assert _largest_graph(CompilationConfig(cudagraph_mode=CUDAGraphMode.NONE)) == 0


@pytest.mark.parametrize("whole", [False, True])
def test_graphs_mean_nothing_on_the_cpu(whole: bool) -> None:
    assert engine._graphs(False, whole) == {}
