"""`polyrex registry`: the registry's database itself, with or without a server beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from cyclopts.types import ExistingFile

from polyrex.server.config import FLAT, default_tasks_folder
from polyrex.server.registry.archive.checking import check as find_faults
from polyrex.server.registry.archive.copying import backup as write_backup
from polyrex.server.registry.archive.copying import export as write_export
from polyrex.server.registry.archive.importing import import_file, some_names
from polyrex.server.registry.database import Database, folder_url

from .settings import EVERY_OPTION, PREFIX


@dataclass(frozen=True)
class Place:
    """Where the registry is; the environment variables are those of `polyrex serve`."""

    registry: Annotated[
        str | None, Parameter(env_var=(f"{PREFIX}SERVE_REGISTRY", f"{PREFIX}SERVE_REGISTRY_URL"))
    ] = None
    """Database: sqlite:///FILE, or postgresql://USER@HOST/NAME; a file in --tasks-dir if not given.
    A password belongs in the environment variable or in ~/.pgpass."""
    tasks_folder: Annotated[
        Path, Parameter(name="tasks-dir", env_var=f"{PREFIX}SERVE_TASKS_DIR")
    ] = field(default_factory=default_tasks_folder)
    """Folder where registered tasks are kept."""

    def open(self, *, serving: bool) -> Database:
        """Open the database; with `serving`, as a server has it. Raises StartError."""
        return Database(self.registry or folder_url(self.tasks_folder), serving=serving)


At = Annotated[Place, FLAT]

app = App(
    name="registry",
    help="Migrate, check, back up, export and import the registry of tasks.",
    default_parameter=EVERY_OPTION,
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
)


@app.command
def migrate(*, place: At = Place()) -> None:
    """Bring the tables to this version, as a server does when it starts.

    A file must not be in use.
    """
    place.open(serving=True).close()
    print("the registry has the tables of this version")


@app.command
def check(*, place: At = Place()) -> int:
    """Look whether the registry is whole: its tables, and every router's bytes.

    Prints a line for each fault, and exits with 1 where there is one. A server may run meanwhile.
    """
    with place.open(serving=False) as database:
        faults = find_faults(database)
    print("\n".join(faults) or "the registry is whole")
    return 1 if faults else 0


@app.command
def backup(
    file: Annotated[Path, Parameter(help="The new file.")],
    *,
    place: At = Place(),
) -> None:
    """Write the whole registry to one file: keys, secrets and history, too.

    The file is a registry, and can take the place of a damaged one. A server may run meanwhile.
    """
    with place.open(serving=False) as database:
        write_backup(database, file)
    print(f"{file} is a backup of the registry")


@app.command
def export(
    file: Annotated[Path, Parameter(help="The new file.")],
    *,
    place: At = Place(),
) -> None:
    """Write tenants and tasks to one file, for `import` into another registry.

    Keys, secrets and history are left out. A server may run meanwhile.
    """
    with place.open(serving=False) as database:
        write_export(database, file)
    print(f"{file} has the registry's tenants and tasks")


@app.command(name="import")
def import_tasks(
    file: Annotated[ExistingFile, Parameter(help="An export or a backup.")],
    *,
    place: At = Place(),
) -> None:
    """Add the tenants and tasks of an export, or of a backup: all of them, or none.

    Where a task of the same name has another router, nothing is imported. A task that is dropped
    here stays so. A file must not be in use; servers that share PostgreSQL may run.
    """
    with place.open(serving=True) as database:
        done = import_file(database, file)
    print(f"{done.tasks} tasks and {done.tenants} tenants added, {done.unchanged} tasks unchanged")
    if done.dropped:
        print(f"dropped here, and left so: {some_names(done.dropped)}")
