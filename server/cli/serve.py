"""`polyrex serve`: start the server."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Annotated

from polyrex.kernels.cpu.threads import describe_threads
from polyrex.server.config import FLAT, Launch, LogFormat
from polyrex.server.http.auth import read_key_digests
from polyrex.server.launch.process import bind, check_exposure, run
from polyrex.server.launch.progress import Progress
from polyrex.server.observability.logs import set_up_logging


def serve(*, launch: Annotated[Launch, FLAT] = Launch()) -> None:  # noqa: B008  # frozen
    """Serve an inventory and its tasks over HTTP, in OpenAI's API.

    Send a request with the field `task`, or with a task's name as `model`.
    """
    form = set_up_logging(launch.log_format)
    # Starting and stopping are reported here.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    progress = Progress(in_log=form is LogFormat.json)
    keys = read_key_digests(launch.api_key_file) if launch.api_key_file else ()
    check_exposure(launch.server.host, keys=bool(keys), insecure=launch.insecure)
    server = replace(launch.server, api_key_digests=keys)
    _serve(replace(launch, server=server), progress)


def _serve(launch: Launch, progress: Progress) -> None:
    config = launch.server
    with bind(config.host, config.port) as listener:
        progress.say(describe_threads(os.environ))
        with progress.stage("torch and transformers"):
            # These imports take seconds: the port comes first.
            from polyrex.server.launch.examples import examples_text
            from polyrex.server.launch.loading import load
        loaded = load(launch, progress)
        progress.say("warming up the engine")

        def ready() -> None:
            address = f"http://{config.host}:{config.port}"
            progress.say(f"ready on {address} after {progress.elapsed():.1f} s; try:")
            text = examples_text(config, loaded.registry, loaded.examples)
            print(f"\n{text}\n", flush=True)  # it may be a file, and serving goes on

        run(loaded.app, listener, config, ready)
