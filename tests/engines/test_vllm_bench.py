"""What the benchmark makes of the rates that it measured."""

from __future__ import annotations

import random

from polyrex.server.engines.vllm_bench_engines import IN_FLIGHT
from polyrex.server.engines.vllm_bench_meter import Meter, popular


def test_ratio_is_over_the_nearest_turns() -> None:
    rates = {"base": {0: 10.0, 2: 20.0, 5: 40.0}, "ours": {1: 15.0, 3: 30.0, 6: 10.0}}
    meter = Meter(rates=rates, turn=7)
    # over 15, the mean of 10 and 20; over 30, of 20 and 40; over 40, the last
    assert meter.ratio("ours", "base") == 1.0
    rates["ours"] = {6: 10.0}
    assert meter.ratio("ours", "base") == 0.25
    assert meter.medians() == {"base": 20.0, "ours": 10.0}


def test_popularities() -> None:
    draw = random.Random(0)
    assert popular("none", 0, draw) == [None] * IN_FLIGHT
    assert popular("identical", 9, draw) == [0] * IN_FLIGHT
    assert popular("distinct", IN_FLIGHT, draw) == list(range(IN_FLIGHT))
    assert set(popular("uniform", 2, draw)) == {0, 1}
    zipf = popular("zipf", 10_000, draw)
    assert max(zipf.count(task) for task in zipf) == zipf.count(0) > 1
    assert set(zipf) <= set(range(10_000))
