"""The doctor's report: every check with the settings at hand, and the table of backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polyrex.adapters.methods.registry import METHODS
from polyrex.adapters.model.base_model import torch_dtype
from polyrex.adapters.serving.backends import explain
from polyrex.server.config import Launch

from . import installation, machine
from .finding import Finding, Status

Check = Callable[[Launch], Finding]

CHECKS: tuple[Check, ...] = (
    installation.packages,
    machine.compiler,
    machine.processor,
    machine.cores,
    machine.gpu,
    installation.vllm,
    installation.base_model,
    installation.inventory,
    installation.cache,
    installation.tasks,
    installation.memory,
)

_STYLES = {Status.ok: "green", Status.note: "yellow", Status.missing: "red"}


@dataclass(frozen=True)
class Backend:
    """The backend of a method's adapters, and the reason for it."""

    method: str
    form: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Report:
    """All findings about an installation and the settings of a server."""

    engine: str
    device: str
    dtype: str
    findings: tuple[Finding, ...]
    backends: tuple[Backend, ...]

    @property
    def ready(self) -> bool:
        """Whether `polyrex serve` has all that it needs."""
        return all(each.status is not Status.missing for each in self.findings)

    def document(self) -> dict[str, Any]:
        """The report as JSON."""
        return {"ready": self.ready, **asdict(self)}


def examine(launch: Launch) -> Report:
    """Run every check."""
    return Report(
        engine=launch.engine,
        device=machine.runs_on(launch).type,
        dtype=launch.dtype,
        findings=tuple(check(launch) for check in CHECKS),
        backends=_backends(launch),
    )


def _backends(launch: Launch) -> tuple[Backend, ...]:
    dtype, device = torch_dtype(launch.dtype), machine.runs_on(launch)
    lines = (
        Backend(name, spec.form if "form" in cls.uses else "", *explain(spec, dtype, device))
        for name, cls in METHODS.items()
        for spec in cls.examples
    )
    return tuple(dict.fromkeys(lines))


def show(report: Report, console: Console) -> None:
    """Print the report for people."""
    table = Table.grid(padding=(0, 2))
    for name in ("part", "status"):
        table.add_column(name, no_wrap=True)
    table.add_column("findings", overflow="fold")
    for each in report.findings:
        status = f"[{_STYLES[each.status]}]{each.status}[/]"
        table.add_row(each.part, status, escape(each.found))
        if each.effect:
            table.add_row("", "", f"[dim]{escape(each.effect)}[/]")
        if each.advice:
            table.add_row("", "", f"to change this: {escape(each.advice)}")
    console.print(table)
    console.print(f"\nAdapters on {report.device}, {report.dtype}, {report.engine} engine")
    table = Table("method", "backend", "because", box=box.SIMPLE_HEAD, pad_edge=False)
    for line in report.backends:
        method = f"{line.method} ({line.form})" if line.form else line.method
        table.add_row(method, line.backend, escape(line.reason))
    console.print(table)
    missing = [each.part for each in report.findings if each.status is Status.missing]
    if missing:
        console.print(f"polyrex serve cannot start with these settings: {', '.join(missing)}")
    else:
        console.print("polyrex serve can start with these settings.")
