"""The server under Ray Serve: replicas over one registry, which Ray starts, watches and scales.

`serve run polyrex.server.ray_app:app` takes the settings of `polyrex serve` from the environment
and from the file that POLYREX_CONFIG names. Serve's own file gives them as `args` of the
application, with the keys of the table [serve]. Each replica runs the whole HTTP application, so
that every route and every field of a request is there; docs/decisions/ray-serve.md says why.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from polyrex.server.cli.main import COMMANDS
from polyrex.server.cli.settings import EVERY_OPTION, PREFIX, sources
from polyrex.server.config import Device, EngineName, Launch, ServerConfig
from polyrex.server.errors import EngineRestarting, StartError
from polyrex.server.http.auth import read_key_digests
from polyrex.server.launch.process import check_exposure
from polyrex.server.launch.progress import Progress

MOST_REPLICAS = 7
"""Each has 13 connections at most, and PostgreSQL has 97 for all of them by default."""
STOP_SECONDS = 10
"""What an engine may take to stop, once the requests of its replica have ended."""
_SECRETS = ("password", "sslpassword")  # of PostgreSQL's parameters
_ANYWHERE = "0.0.0.0"  # Ray's proxies listen where Serve's http_options say: it may be anywhere


def app(args: Mapping[str, Any]) -> Application:
    """The application for Serve to run; `args` come before the environment and the file.

    Raises StartError where a setting is wrong, or where replicas could not share a registry.
    """
    _check_secrets(args)
    launch = read_launch(args)
    if not (launch.registry.url or "").startswith("postgresql"):
        raise StartError(
            "replicas share one registry, which a file cannot be: give registry.url ="
            f" postgresql://USER@HOST/NAME, as an argument or in {PREFIX}SERVE_REGISTRY_URL"
        )
    deployment = serve.deployment(**deployment_options(launch))(serve.ingress()(Replica))
    return deployment.bind(launch)


def deployment_options(launch: Launch) -> dict[str, Any]:
    """What Ray is told of a replica; `deployments` in Serve's file overrides each of these."""
    server = launch.server
    engine = launch.vllm if launch.engine is EngineName.vllm else launch.embedded
    ranks = launch.vllm.tensor_parallel if launch.engine is EngineName.vllm else 1
    return {
        "name": "polyrex",
        # A replica has another one beside it as soon as its batch is full.
        "autoscaling_config": AutoscalingConfig(
            max_replicas=MOST_REPLICAS, target_ongoing_requests=engine.max_running
        ),
        "ray_actor_options": {
            "num_cpus": ranks,  # Ray gives torch as many threads
            "num_gpus": ranks if launch.device is Device.cuda else 0,
        },
        # As many requests wait in a proxy as a replica takes; further ones are answered as the
        # application itself answers them.
        "max_ongoing_requests": server.max_in_flight,
        "max_queued_requests": server.max_in_flight,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
        "health_check_period_s": 2,
        "graceful_shutdown_wait_loop_s": 1,
        "graceful_shutdown_timeout_s": server.drain_seconds + STOP_SECONDS,
    }


class Replica:
    """One server, in a process of Ray's; Ray runs the lifespan of its application."""

    def __init__(self, launch: Launch) -> None:
        # imported here: the process that builds the application needs neither torch nor a model
        from polyrex.server.launch.loading import load

        self._app = load(launch, Progress()).app

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def check_health(self) -> None:
        """Raise StartError or EngineStopped where only a new replica helps.

        An engine that the replica itself starts again needs no new replica.

        Ray sends a replica its first request once this has returned for the first time, which it
        does when the engine has started.
        """
        context = self._app.state.context
        await context.readiness.settled.wait()
        if context.readiness.failure is not None:
            raise StartError(f"the engine failed to start: {context.readiness.failure}")
        with suppress(EngineRestarting):
            context.engine.check()


def read_launch(args: Mapping[str, Any]) -> Launch:
    """The settings, with the API keys of the file that they name."""
    program = App(name="polyrex", default_parameter=EVERY_OPTION)
    program.command(COMMANDS["serve"].path, name="serve")
    file = os.environ.get(f"{PREFIX}CONFIG")
    try:
        program.config = sources(Path(file) if file else None, COMMANDS)
        asked = ["serve", *_flags(args)]
        _, bound, _ = program.parse_args(asked, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise StartError(" ".join(str(error).split())) from error
    launch: Launch = bound.arguments.get("launch", Launch())
    if (launch.server.host, launch.server.port) != (ServerConfig.host, ServerConfig.port):
        raise StartError("host and port are Ray's here: give them in http_options of Serve's file")
    keys = read_key_digests(launch.api_key_file) if launch.api_key_file else ()
    check_exposure(_ANYWHERE, keys=bool(keys), insecure=launch.insecure)
    return replace(launch, server=replace(launch.server, host=_ANYWHERE, api_key_digests=keys))


def _check_secrets(args: Mapping[str, Any]) -> None:
    """Raise StartError where arguments hold a database's password: Ray logs and shows them."""
    for flag in _flags(args):
        name, _, value = flag.partition("=")
        if name == "--registry.url" and _holds_password(value):
            raise StartError(
                "registry.url holds a password, and Ray shows arguments in its dashboard: give the"
                f" URL in {PREFIX}SERVE_REGISTRY_URL, or the password in PGPASSWORD or ~/.pgpass"
            )


def _holds_password(address: str) -> bool:
    try:
        url = make_url(address)
    except ArgumentError:  # told where it is opened
        return False
    return url.password is not None or not url.query.keys().isdisjoint(_SECRETS)


def _flags(args: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The settings of nested tables as the command line spells them."""
    for name, value in args.items():
        flag = prefix + name.replace("_", "-")
        if isinstance(value, Mapping):
            yield from _flags(value, f"{flag}.")
        else:
            values = value if isinstance(value, list) else [value]
            yield from (f"--{flag}={each}" for each in values)
