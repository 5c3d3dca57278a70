"""How long completions take, in the histograms of vLLM: the same names, units and buckets."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram

ENGINE = "0"
"""vLLM counts the engines behind one address from 0; here there is one."""
ENDINGS = ("stop", "length", "abort", "error")
"""How a completion ends; `abort` is a client that went away, or a deadline."""

# The bounds are those of vllm/v1/metrics/buckets.py, so that dashboards may add both up.
_REQUEST = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_NEXT_TOKEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
"""vLLM ends them at the model's context; these are the same up to there, and do not wait for it."""


class CompletionMetrics:
    """The histograms of completions; every series is made at start, with nothing counted."""

    def __init__(self, model: str, registry: CollectorRegistry) -> None:
        """`model` is the base model's id."""

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(
                f"vllm:{name}", text, ("model_name", "engine"), buckets=buckets, registry=registry
            )
            return made.labels(model, ENGINE)

        self.first_token = histogram(
            "time_to_first_token_seconds",
            "From the receipt of a request to a completion's first token",
            _FIRST_TOKEN,
        )
        self.next_token = histogram(
            "inter_token_latency_seconds", "From one output of tokens to the next", _NEXT_TOKEN
        )
        self.mean_token = histogram(
            "request_time_per_output_token_seconds",
            "Mean time of a completion's tokens after the first",
            _NEXT_TOKEN,
        )
        self.latency = histogram(
            "e2e_request_latency_seconds",
            "From the receipt of a request to a completion's end",
            _REQUEST,
        )
        self.queue = histogram(
            "request_queue_time_seconds", "What requests wait for a place in the engine", _REQUEST
        )
        self.prompt = histogram("request_prompt_tokens", "Tokens of a prompt", _TOKENS)
        self.generated = histogram("request_generation_tokens", "Tokens of a completion", _TOKENS)
        finished = Counter(
            "vllm:request_success",
            "Completions by how they ended",
            ("model_name", "engine", "finished_reason"),
            registry=registry,
        )
        self.finished = {reason: finished.labels(model, ENGINE, reason) for reason in ENDINGS}


class CompletionTimes:
    """Times one completion, and tells the histograms."""

    def __init__(
        self,
        metrics: CompletionMetrics,
        received: float,
        prompt_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`received` is the clock's time at which the request had come, in seconds."""
        self._metrics = metrics
        self._received = received
        self._prompt_tokens = prompt_tokens
        self._clock = clock
        self._first = self._last = received
        self._slowest = 0.0
        self._ended = False
        self.generated = 0
        self.outputs = 0

    def tokens(self, count: int) -> None:
        """Count tokens that became ready together, now."""
        now = self._clock()
        if self.outputs == 0:
            self._first = now
            self._metrics.first_token.observe(now - self._received)
        else:
            self._slowest = max(self._slowest, now - self._last)
            self._metrics.next_token.observe(now - self._last)
        self._last = now
        self.outputs += 1
        self.generated += count

    def end(self, reason: str) -> bool:
        """Count the completion as ended, with one of ENDINGS; False where it had ended already."""
        if self._ended:
            return False
        self._ended = True
        metrics = self._metrics
        metrics.finished[reason].inc()
        if reason in ("stop", "length"):
            metrics.latency.observe(self._clock() - self._received)
            metrics.prompt.observe(self._prompt_tokens)
            metrics.generated.observe(self.generated)
            if self.generated > 1:
                metrics.mean_token.observe((self._last - self._first) / (self.generated - 1))
        return True

    def about(self) -> dict[str, int | float]:
        """What a trace says of the completion: counts, and seconds."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "generated_tokens": self.generated,
            "engine_steps": self.outputs,
            "seconds_to_first_token": self._first - self._received,
            "slowest_step_seconds": self._slowest,
        }
