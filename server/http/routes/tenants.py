"""Tenants, their quotas and their API keys, while requests run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field, StringConstraints, model_validator
from starlette.responses import JSONResponse, Response

from polyrex.server.http.conditions import JSON_ONLY
from polyrex.server.http.context import Asker, Context
from polyrex.server.http.json_body import JsonRoute
from polyrex.server.http.responses import Json
from polyrex.server.registry.principal import Role
from polyrex.server.registry.tenants.records import Key, NewKey, Quotas, Tenant
from polyrex.server.requests.bodies import Wire

router = APIRouter(prefix="/v1", route_class=JsonRoute, dependencies=[JSON_ONLY])

MOST_TENANTS = 1000
"""The most tenants on a page of GET /v1/tenants."""

Limit = Annotated[int, Field(ge=0, le=(1 << 53) - 1)]
Weight = Annotated[int, Field(ge=1, le=1000)]
Seconds = Annotated[float, Field(gt=0, le=100 * 366 * 24 * 3600)]


class QuotaChanges(Wire):
    """Some of a tenant's quotas; null takes a limit away."""

    tasks: Limit | None = None
    bytes: Limit | None = None
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrent: Limit | None = None
    weight: Weight | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, body: Any) -> Any:
        return body  # here it is

    def given(self) -> dict[str, int | None]:
        """The limits that the body names."""
        return {name: getattr(self, name) for name in self.model_fields_set}


class TenantBody(Wire):
    """A new tenant."""

    name: str
    quotas: QuotaChanges = QuotaChanges()


class TenantChange(Wire):
    """What is to change of a tenant; everything else stays."""

    quotas: QuotaChanges = QuotaChanges()
    disabled: bool | None = None


class KeyBody(Wire):
    """A new API key."""

    role: Annotated[Role, Field(strict=False)]
    label: Annotated[str, StringConstraints(max_length=256)] = ""
    expires_in: Seconds | None = None


class Rotation(Wire):
    """How an API key is replaced."""

    grace: Annotated[float, Field(ge=0, le=366 * 24 * 3600)] = 0


@router.get("/whoami")
async def whoami(context: Context, asker: Asker) -> Response:
    """Show whose key this is, and what its tenant may use."""
    tenant = context.directory.tenant(asker.tenant)
    shown = {"tenant": asker.tenant, "role": asker.role, "key": asker.key}
    return JSONResponse(shown | {"quotas": asdict(tenant.quotas)})


@router.post("/tenants")
async def create_tenant(body: TenantBody, context: Context, asker: Asker) -> Response:
    """Make a tenant."""
    quotas = Quotas().changed(body.quotas.given())
    made = await context.writes.run(context.directory.create_tenant, asker, body.name, quotas)
    return JSONResponse(_tenant_shape(made), 201)


@router.get("/tenants")
async def tenants(
    context: Context,
    after: Annotated[str, Query(description="a tenant's name; the page begins after it")] = "",
    limit: Annotated[int, Query(ge=1, le=MOST_TENANTS)] = 100,
) -> Response:
    """List a page of tenants, ordered by name."""
    found = [tenant for tenant in context.directory.tenants() if tenant.name > after]
    page = [_tenant_shape(tenant) for tenant in found[:limit]]
    return JSONResponse({"object": "list", "data": page, "has_more": len(found) > limit})


@router.get("/tenants/{name}")
async def tenant(name: str, context: Context) -> Response:
    """Show one tenant."""
    return JSONResponse(_tenant_shape(context.directory.tenant(name)))


@router.patch("/tenants/{name}")
async def change_tenant(name: str, body: TenantChange, context: Context, asker: Asker) -> Response:
    """Change a tenant's quotas, or disable it: its keys are refused until it is enabled again."""
    changed = await context.writes.run(
        context.directory.change_tenant,
        asker,
        name,
        quotas=body.quotas.given(),
        disabled=body.disabled,
    )
    return JSONResponse(_tenant_shape(changed))


@router.post("/tenants/{name}/keys")
async def create_key(name: str, body: KeyBody, context: Context, asker: Asker) -> Response:
    """Make an API key of a tenant. The answer shows it whole, and nothing does again."""
    made = await context.writes.run(
        context.directory.create_key,
        asker,
        name,
        body.role,
        label=body.label,
        lifetime=body.expires_in,
    )
    return _new_key(made)


@router.get("/tenants/{name}/keys")
async def keys(name: str, context: Context) -> Response:
    """List the API keys of a tenant, valid or not, oldest first."""
    found = [_key_shape(key) for key in context.directory.keys(name)]
    return JSONResponse({"object": "list", "data": found, "has_more": False})


@router.post("/keys/{key_id}/rotate")
async def rotate_key(
    key_id: str, context: Context, asker: Asker, body: Rotation | None = None
) -> Response:
    """Replace an API key by a new one; the old one is valid for `grace` seconds more."""
    grace = (body or Rotation()).grace
    return _new_key(await context.writes.run(context.directory.rotate_key, asker, key_id, grace))


@router.delete("/keys/{key_id}")
async def revoke_key(key_id: str, context: Context, asker: Asker) -> Response:
    """Refuse an API key from now on."""
    revoked = await context.writes.run(context.directory.revoke_key, asker, key_id)
    return JSONResponse(_key_shape(revoked))


def _new_key(made: NewKey) -> Response:
    # No cache on the way may keep it.
    headers = {"cache-control": "no-store"}
    return JSONResponse(_key_shape(made.key) | {"key": made.secret}, 201, headers)


def _tenant_shape(tenant: Tenant) -> Json:
    return {
        "name": tenant.name,
        "object": "tenant",
        "created": int(tenant.created),
        "quotas": asdict(tenant.quotas),
        "disabled": tenant.disabled,
    }


def _key_shape(key: Key) -> Json:
    return {
        "id": key.id,
        "object": "key",
        "tenant": key.tenant,
        "role": key.role,
        "label": key.label,
        "created": int(key.created),
        "expires": key.expires,
        "revoked": key.revoked,
    }
