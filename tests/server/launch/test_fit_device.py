"""Where a server fits tasks."""

from __future__ import annotations

import pytest

from polyrex.server.config import Device, Launch, ServerConfig
from polyrex.server.launch.loading import server_settings


@pytest.mark.parametrize(
    ("engine", "asked", "fits"),
    [
        ("auto", "auto", "auto"),
        ("cuda", "auto", "auto"),
        ("cpu", "auto", "cpu"),
        ("cpu", "cuda", "cuda"),
        ("cuda", "cpu", "cpu"),
    ],
)
def test_fits_stay_off_cards_that_the_engine_is_kept_from(
    engine: str, asked: str, fits: str
) -> None:
    launch = Launch(server=ServerConfig(fit_device=Device(asked)), device=Device(engine))
    assert server_settings(launch).fit_device == fits
