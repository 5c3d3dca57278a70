"""What a server says in /metrics."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus

from prometheus_client.parser import text_string_to_metric_families

from support.reliability.client import LOST, Client

LOOP_LAG = "polyrex_loop_lag_seconds"
_TRIES = 100


@dataclass(frozen=True)
class Scrape:
    """One answer of /metrics: the samples, by name and labels."""

    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float]

    @classmethod
    def of(cls, client: Client) -> Scrape:
        """Ask for it, again and again where the server is too busy even for that."""
        for _ in range(_TRIES):
            with suppress(*LOST):
                answer = client.send("GET", "/metrics")
                if answer.status == HTTPStatus.OK:
                    return cls._read(answer.body.decode())
            time.sleep(0.1)
        raise TimeoutError("/metrics does not answer")

    @classmethod
    def _read(cls, text: str) -> Scrape:
        return cls(
            {
                (sample.name, tuple(sorted(sample.labels.items()))): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }
        )

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name that have these labels."""
        wanted = set(labels.items())
        return sum(
            value
            for (found, own), value in self.samples.items()
            if found == name and wanted <= set(own)
        )

    def late_turns(self, before: Scrape, seconds: float) -> float:
        """How often the event loop was later than so many seconds, since `before`.

        `seconds` is one of the bounds of the histogram. Raises KeyError where it is none, or where
        the server does not measure.
        """

        def late(scrape: Scrape) -> float:
            within = scrape.samples[f"{LOOP_LAG}_bucket", (("le", str(seconds)),)]
            return scrape.samples[f"{LOOP_LAG}_count", ()] - within

        return late(self) - late(before)
