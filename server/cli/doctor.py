"""`polyrex doctor`: check the installation against the settings of `polyrex serve`."""

from __future__ import annotations

import json
import logging
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from polyrex.server.config import FLAT, Launch
from polyrex.server.doctor.report import examine, show


def doctor(
    *,
    launch: Annotated[Launch, FLAT] = Launch(),  # noqa: B008  # frozen
    as_json: Annotated[
        bool, Parameter(name="--json", help="Print one JSON document.", negative=())
    ] = False,
) -> int:
    """Check the installation: what is there, what will run on it and why, what to do otherwise.

    Takes the settings of `polyrex serve`: its flags, its environment variables (POLYREX_SERVE_...)
    and its table [serve] in a TOML file. Exits with 1 if the server could not start with them.
    """
    logging.disable(logging.WARNING)  # the report says the same
    try:
        report = examine(launch)
    finally:
        logging.disable(logging.NOTSET)
    if as_json:
        print(json.dumps(report.document(), indent=2))
    else:
        show(report, Console())
    return 0 if report.ready else 1
