"""The names of tasks as requests spell them: `name`, `name@3`, `name@prod`, `tenant:name`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from polyrex.adapters.errors import InvalidTaskName, UnknownTask
from polyrex.adapters.task_name import TASK_NAME
from polyrex.server.errors import InvalidRequest

TENANT_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
ALIAS = re.compile(r"[a-z][a-z0-9._-]{0,63}")
MOST_LABELS = 32
LABEL_KEY = re.compile(r"[a-z0-9][a-z0-9._/-]{0,62}")
LABEL_VALUE = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{0,256}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_REFERENCE = re.compile(
    rf"(?:({TENANT_NAME.pattern}):)?({TASK_NAME.pattern})"
    rf"(?:@({_VERSION.pattern}|{ALIAS.pattern}))?"
)


@dataclass(frozen=True)
class Reference:
    """A task as a request names it; without a tenant, the task is the asker's own."""

    name: str
    tenant: str | None = None
    selector: int | str | None = None  # a version, an alias, or the current version

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference; raises UnknownTask where no task could have that name."""
        match = _REFERENCE.fullmatch(text)
        if match is None:
            raise UnknownTask
        selector = match[3]
        pinned = int(selector) if selector and _VERSION.fullmatch(selector) else selector
        return cls(match[2], match[1], pinned)


def check_task_name(name: str) -> None:
    """Raise InvalidTaskName where a task cannot be registered under this name."""
    if not TASK_NAME.fullmatch(name):
        raise InvalidTaskName(f"a task name matches {TASK_NAME.pattern}, got {name!r:.80}")


def check_tenant_name(name: str, param: str) -> None:
    """Raise InvalidRequest, about the field `param`, where no tenant can have this name."""
    if not TENANT_NAME.fullmatch(name):
        raise InvalidRequest(
            f"a tenant's name matches {TENANT_NAME.pattern}, got {name!r:.80}", param
        )


def check_labels(labels: Mapping[str, str]) -> None:
    """Raise InvalidRequest where a task cannot have these labels."""
    if len(labels) > MOST_LABELS:
        raise InvalidRequest(f"a task has at most {MOST_LABELS} labels", "labels")
    for key, value in labels.items():
        if not LABEL_KEY.fullmatch(key):
            raise InvalidRequest(f"a label's key matches {LABEL_KEY.pattern}", "labels")
        if not LABEL_VALUE.fullmatch(value):
            raise InvalidRequest(
                f"label {key}: a value has at most 256 characters, none of control", "labels"
            )
