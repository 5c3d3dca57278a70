"""What the proofs of a run share: the tiny model, folders, and a PostgreSQL server."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from support.reliability.fork_server import ForkServer
from support.reliability.small_base import SmallBase
from support.storage.postgres import NOT_INSTALLED, Cluster, find_binaries, running_cluster


@dataclass
class Ground:
    """Where proofs run; everything is made when it is first needed."""

    work: Path
    _closing: ExitStack = field(default_factory=ExitStack)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @cached_property
    def small(self) -> SmallBase:
        """The tiny base model."""
        return SmallBase.write(self.folder())

    @cached_property
    def forks(self) -> ForkServer:
        """Starts servers."""
        return self._closing.enter_context(ForkServer(self.small, self.folder()))

    @cached_property
    def cluster(self) -> Cluster:
        """A PostgreSQL server. Raises SystemExit where none is installed."""
        binaries = find_binaries()
        if binaries is None:
            raise SystemExit(NOT_INSTALLED)
        return self._closing.enter_context(running_cluster(binaries))

    def folder(self) -> Path:
        """A new, empty folder."""
        made = self.work / str(next(self._numbers))
        made.mkdir(mode=0o700)
        return made

    def sqlite(self) -> str:
        """The address of a new registry in a file."""
        return f"sqlite:///{self.folder() / 'registry.db'}"

    def postgresql(self) -> str:
        """The address of a new registry on the server."""
        return self.cluster.create_database()


@contextmanager
def prepared(parent: Path | None) -> Iterator[Ground]:
    """A ground in a temporary folder below `parent`; the end leaves nothing behind."""
    with TemporaryDirectory(prefix="polyrex-reliability-", dir=parent) as work, ExitStack() as end:
        yield Ground(Path(work), end)
