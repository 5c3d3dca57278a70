"""`polyrex serve`: start the server."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from polyrex.adapters.errors import PolyrexError
from polyrex.server.config import Device, Dtype, EngineName, Launch, ServerConfig, VllmConfig
from polyrex.server.http.auth import read_key_digests
from polyrex.server.launch.process import bind, check_exposure, run
from polyrex.server.launch.progress import Progress

_SERVER = ServerConfig(model="smollm2-135m-instruct")


def default_tasks_folder() -> Path:
    """Where registered tasks are kept: polyrex/tasks in the user's state folder."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "polyrex" / "tasks"


def serve(
    base: Annotated[
        str, typer.Option(help="The base model: a name, or a folder in Hugging Face's format.")
    ] = _SERVER.model,
    inventory: Annotated[
        Path | None,
        typer.Option(help="The inventory's file.", show_default="the one shipped for the base"),
    ] = None,
    tasks_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where registered tasks are kept.",
            show_default="polyrex/tasks in the user's state folder",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = _SERVER.host,
    port: Annotated[int, typer.Option(help="The port to listen on.", min=1, max=65535)] = (
        _SERVER.port
    ),
    dtype: Annotated[Dtype, typer.Option(help="What the model computes in.")] = Launch.dtype,
    device: Annotated[Device, typer.Option(help="What the model computes on.")] = Launch.device,
    engine: Annotated[EngineName, typer.Option(help="What runs the model.")] = Launch.engine,
    eager: Annotated[
        bool, typer.Option("--eager", help="vllm: do not compile; starts sooner.")
    ] = False,
    tensor_parallel: Annotated[
        int, typer.Option(help="vllm: how many ranks share the model.", min=1)
    ] = VllmConfig.tensor_parallel,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="API keys, one a line; everything but /livez and /readyz asks for one."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen on other addresses without API keys.")
    ] = False,
    max_in_flight: Annotated[
        int, typer.Option(help="Completions under way at most; beyond it, 429.", min=1)
    ] = _SERVER.max_in_flight,
    drain_seconds: Annotated[
        int, typer.Option(help="How long running requests may take after SIGTERM.", min=0)
    ] = _SERVER.drain_seconds,
) -> None:
    """Serve an inventory and its tasks over HTTP, in OpenAI's API.

    Send a request with the field `task`, or with a task's name as `model`.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn").setLevel(
        logging.WARNING
    )  # starting and stopping we tell ourselves
    progress = Progress()
    try:
        keys = read_key_digests(api_key_file) if api_key_file else ()
        check_exposure(host, keys=bool(keys), insecure=insecure)
        config = replace(
            _SERVER,
            model=base,
            host=host,
            port=port,
            api_key_digests=keys,
            max_in_flight=max_in_flight,
            drain_seconds=drain_seconds,
        )
        folder = tasks_dir or default_tasks_folder()
        vllm = VllmConfig(eager=eager, tensor_parallel=tensor_parallel)
        launch = Launch(config, folder, inventory, dtype, device, engine, vllm_config=vllm)
        _serve(launch, progress)
    except PolyrexError as error:
        typer.echo(f"polyrex serve: {error}", err=True)
        raise typer.Exit(1) from error


def _serve(launch: Launch, progress: Progress) -> None:
    config = launch.server
    with bind(config.host, config.port) as listener:
        with progress.stage("torch and transformers"):
            from polyrex.server.launch.loading import (  # takes seconds: the port comes first
                example_request,
                load,
            )
        loaded = load(launch, progress)
        progress.say("warming up the engine")

        def ready() -> None:
            address = f"http://{config.host}:{config.port}"
            progress.say(f"ready on {address} after {progress.elapsed():.1f} s; try:")
            typer.echo(f"\n{example_request(config, loaded.registry)}\n")

        run(loaded.app, listener, config, loaded.app.state.services.readiness, ready)
