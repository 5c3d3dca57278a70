"""The routes by which vLLM loads and unloads adapters while it runs, for clients that know them.

The requests, texts and statuses are vLLM's; what is loaded is a router, as a task.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from polyrex.adapters.errors import TaskExists, UnknownTask
from polyrex.adapters.files.router import size_limit
from polyrex.server.errors import Forbidden
from polyrex.server.http.conditions import JSON_ONLY, UNCONDITIONAL, revision_headers
from polyrex.server.http.context import AppContext, Asker, Context
from polyrex.server.http.json_body import JsonRoute
from polyrex.server.registry.principal import DEFAULT_TENANT, Principal
from polyrex.server.requests.bodies import LoadLora, UnloadLora
from polyrex.server.requests.lora_folder import read_below

router = APIRouter(prefix="/v1", route_class=JsonRoute, dependencies=[JSON_ONLY, UNCONDITIONAL])


@router.post("/load_lora_adapter")
async def load(body: LoadLora, context: Context, asker: Asker) -> Response:
    """Register a router from a file in the tenant's folder of --lora-dir as a task.

    With `load_inplace` an existing task gets a new version, and keeps its old one as `name@N`.
    """
    folder = _folder(context, asker)
    if not body.lora_name or not body.lora_path:
        return _refused("Both 'lora_name' and 'lora_path' must be provided.")
    if context.is_base(body.lora_name):
        return _refused(f"The lora adapter '{body.lora_name}' conflicts with a served base model.")
    return await context.writes.run(_load, context, asker, body, folder)


def _load(context: AppContext, asker: Principal, body: LoadLora, folder: Path) -> Response:
    registry, name = context.registry, body.lora_name
    # One byte more than a router may have, so that a longer file is refused and not cut.
    limit = size_limit(registry.inventory) + 1
    data = read_below(folder, body.lora_path, limit)
    if data is None:
        text = f"Loading lora {name} failed: No adapter found for the lora_path below --lora-dir"
        return _refused(text, "NotFoundError", 404)
    try:
        new = registry.register(asker, name, data, replace=body.load_inplace).created
    except TaskExists:
        new = False
    if not new and not body.load_inplace:
        return _refused(
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter "
            "in place, set 'load_inplace' to True."
        )
    return _done(context, f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/unload_lora_adapter")
async def unload(body: UnloadLora, context: Context, asker: Asker) -> Response:
    """Drop a task."""
    _folder(context, asker)
    name = body.lora_name
    if not name:
        return _refused("'lora_name' needs to be provided to unload a LoRA adapter.")
    try:
        await context.writes.run(context.edits.drop, asker, name)
    except UnknownTask:
        return _refused(f"The lora adapter '{name}' cannot be found.", "NotFoundError", 404)
    return _done(context, f"Success: LoRA adapter '{name}' removed successfully.")


def _folder(context: AppContext, asker: Principal) -> Path:
    """The folder that a tenant may load from: a tenant of its own has one in that of --lora-dir.

    Raises Forbidden where the server was started without one.
    """
    folder = context.config.lora_dir
    if folder is None:
        raise Forbidden("this server loads no files; its flag --lora-dir names a folder of them")
    return folder if asker.tenant == DEFAULT_TENANT else folder / asker.tenant


def _done(context: AppContext, text: str) -> Response:
    return Response(text, headers=revision_headers(context))


def _refused(message: str, kind: str = "InvalidUserInput", status: int = 400) -> Response:
    """An error in vLLM's shape, which has the status as its code."""
    error = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": error}, status)
