"""Times and counts of completions, in vLLM's names, units and buckets."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from polyrex.server.observability import completions
from polyrex.server.observability.completions import CompletionMetrics, CompletionTimes


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def timed(steps: list[tuple[float, int]], reason: str) -> CollectorRegistry:
    """The metrics of one completion: seconds that pass before an output, and its tokens."""
    registry, clock = CollectorRegistry(), Clock()
    times = CompletionTimes(CompletionMetrics("base", registry), 100.0, 7, clock)
    for seconds, tokens in steps:
        clock.now += seconds
        times.tokens(tokens)
    clock.now += 1.0
    assert times.end(reason)
    assert not times.end("abort")  # it has ended
    return registry


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(
        f"vllm:{name}", {"model_name": "base", "engine": "0", **labels}
    )


def test_times_of_a_completion_that_ends() -> None:
    found = timed([(2.0, 1), (0.5, 1), (0.25, 2)], "length")
    assert value(found, "time_to_first_token_seconds_sum") == 2.0
    assert value(found, "inter_token_latency_seconds_sum") == 0.75
    assert value(found, "inter_token_latency_seconds_count") == 2
    assert value(found, "request_time_per_output_token_seconds_sum") == 0.25
    assert value(found, "e2e_request_latency_seconds_sum") == 3.75
    assert value(found, "request_prompt_tokens_sum") == 7
    assert value(found, "request_generation_tokens_sum") == 4
    assert value(found, "request_success_total", finished_reason="length") == 1
    assert value(found, "request_success_total", finished_reason="stop") == 0


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_completion_that_is_cut_off_counts_as_that_alone(reason: str) -> None:
    found = timed([(2.0, 1)], reason)
    assert value(found, "request_success_total", finished_reason=reason) == 1
    assert value(found, "e2e_request_latency_seconds_count") == 0
    assert value(found, "time_to_first_token_seconds_count") == 1


def test_a_completion_of_no_token_has_no_first_one() -> None:
    found = timed([], "length")
    assert value(found, "time_to_first_token_seconds_count") == 0
    assert value(found, "request_time_per_output_token_seconds_count") == 0
    assert value(found, "e2e_request_latency_seconds_sum") == 1.0


def test_every_series_is_there_before_the_first_request() -> None:
    registry = CollectorRegistry()
    CompletionMetrics("base", registry)
    assert value(registry, "time_to_first_token_seconds_count") == 0
    assert value(registry, "request_success_total", finished_reason="error") == 0


def vllm_file(name: str) -> ast.Module:
    """One of vLLM's files, read and not imported: that takes many seconds."""
    found = find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed")
    return ast.parse((Path(found.origin).parent / "v1" / "metrics" / name).read_text())


def test_buckets_are_vllms() -> None:
    theirs = {
        node.target.id: ast.literal_eval(node.value)
        for node in vllm_file("buckets.py").body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(node.value, ast.Tuple)
    }
    assert theirs["REQUEST_LATENCY_BUCKETS"] == completions._REQUEST
    assert theirs["TIME_TO_FIRST_TOKEN_BUCKETS"] == completions._FIRST_TOKEN
    assert theirs["INTER_TOKEN_LATENCY_BUCKETS"] == completions._NEXT_TOKEN
