"""A task as the HTTP API shows it."""

from __future__ import annotations

from typing import Any

from polyrex.adapters.files.registry import TaskInfo


def task_shape(info: TaskInfo) -> dict[str, Any]:
    """A task as the routes of tasks show it."""
    return {
        "name": info.name,
        "object": "task",
        "version": info.version,
        "router_sha256": info.router_sha256,
        "size_bytes": info.size_bytes,
        "created": int(info.created),
        "description": info.description,
        "provenance": dict(info.provenance),
        "scores": dict(info.scores),
    }
