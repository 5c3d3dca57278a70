"""`polyrex params`."""

from __future__ import annotations

from support.command_line import polyrex


def test_multi_task_and_adaptation_counts_are_printed() -> None:
    line = "--base t0-3b --method tensorpoly-1 --experts 8 --order 2 --rank 16 --tasks 313"
    result = polyrex("params", *line.split())
    assert result.exit_code == 0
    lines = [row.split() for row in result.output.splitlines()]
    assert ["multi-task", "(313", "tasks)", "12,215,088", "12.2M"] in lines
    assert ["adaptation", "(one", "new", "task)", "3,456", "3.5k"] in lines


def test_hyperparameter_that_the_method_lacks_is_an_error() -> None:
    result = polyrex("params", "--method", "lora", "--experts", "3")
    assert result.exit_code == 2
    assert result.stderr.startswith("polyrex params: lora has no experts (got 3)")
