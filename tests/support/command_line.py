"""Runs `polyrex` in this process, as the console script would."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

from polyrex.server.cli.main import main


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def polyrex(*arguments: object) -> Finished:
    """Run a command to its end."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        exit_code = main([str(argument) for argument in arguments])
    return Finished(exit_code, stdout.getvalue(), stderr.getvalue())
