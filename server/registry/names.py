"""The names of tasks as requests spell them: `name`, `name@3`, `name@prod`, `tenant:name`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from polyrex.adapters.errors import InvalidTaskName, UnknownTask
from polyrex.adapters.files.task import TASK_NAME

TENANT_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
ALIAS = re.compile(r"[a-z][a-z0-9._-]{0,63}")
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
