"""`polyrex params`."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from polyrex.adapters.errors import SpecError
from polyrex.server.cli.params import params


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(params)
    return app


def test_multi_task_and_adaptation_counts_are_printed(app: typer.Typer) -> None:
    line = "--base t0-3b --method tensorpoly-1 --experts 8 --order 2 --rank 16 --tasks 313"
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0
    lines = [row.split() for row in result.output.splitlines()]
    assert ["multi-task", "(313", "tasks)", "12,215,088", "12.2M"] in lines
    assert ["adaptation", "(one", "new", "task)", "3,456", "3.5k"] in lines


def test_hyperparameter_that_the_method_lacks_is_an_error(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["--method", "lora", "--experts", "3"])
    assert isinstance(result.exception, SpecError)
