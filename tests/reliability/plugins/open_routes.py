"""A pytest plugin that plants a defect: every role may use every route."""

from __future__ import annotations

from dataclasses import replace

import pytest
from starlette.types import Scope

from polyrex.server.http import access, auth
from polyrex.server.registry.principal import Role


@pytest.fixture(autouse=True)
def planted_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the rule of every route that only some roles may use."""

    def open_rule(scope: Scope) -> access.Rule | None:
        rule = access.rule_of(scope)
        return None if rule is None else replace(rule, roles=frozenset(Role))

    monkeypatch.setattr(auth, "rule_of", open_rule)
