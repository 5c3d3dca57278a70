"""A PostgreSQL server of the tests' own: unprivileged, on a loopback port, deleted at the end."""

from __future__ import annotations

import itertools
import os
import pwd
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from support.reliability.ports import reserved_port

NOT_INSTALLED = "PostgreSQL's server is not installed (Debian: apt-get install postgresql)"

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "32MB",
    "fsync": "on",
}


def find_binaries() -> Path | None:
    """The folder of Debian's newest PostgreSQL server; None where there is none."""
    folders = [each.parent for each in Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    return max(folders, key=lambda each: int(each.parent.name), default=None)


@dataclass
class Cluster:
    """A PostgreSQL server and its databases."""

    binaries: Path
    folder: Path
    port: int
    password: str
    user: tuple[str, ...]  # the beginning of a command that an unprivileged user runs
    process: subprocess.Popen[bytes] | None = None
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def url(self, database: str = "postgres") -> str:
        """The address of a database, with its password."""
        return f"postgresql://polyrex:{self.password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = [part for name, value in _SETTINGS.items() for part in ("-c", f"{name}={value}")]
        # INT ends it quickly and in order, also where this process is killed.
        command = [*self.user, "--pdeathsig=INT", str(self.binaries / "postgres")]
        data = self.folder / "data"
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "-D", str(data), "-p", str(self.port), *options], stdout=log, stderr=log
            )
        for _ in range(600):
            if self.process.poll() is not None:
                raise RuntimeError((self.folder / "log").read_text())
            if self._answers():
                return
            time.sleep(0.05)
        raise RuntimeError("PostgreSQL does not answer: " + (self.folder / "log").read_text())

    def stop(self, sign: signal.Signals = signal.SIGINT) -> None:
        """End the server: INT breaks connections off and writes all to disk, QUIT is a crash."""
        if self.process is not None:
            self.process.send_signal(sign)
            self.process.wait(60)
            self.process = None

    def create_database(self) -> str:
        """Make a new, empty database, and return its address."""
        name = f"test_{next(self.numbers)}"
        self.run(f"CREATE DATABASE {name}")
        return self.url(name)

    def run(self, statement: str) -> None:
        """Run a statement on the server, outside of any transaction."""
        import psycopg  # conftest.py imports this file, and a GPU's machine may lack psycopg

        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(statement.encode())

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


@contextmanager
def running_cluster(binaries: Path) -> Iterator[Cluster]:
    """A new server in a temporary folder, stopped and deleted at the end."""
    # pytest's own folders are closed to other users.
    with (
        tempfile.TemporaryDirectory(prefix="polyrex-postgres-") as name,
        reserved_port() as port,
    ):
        folder = Path(name)
        command = ["setpriv"]
        if os.getuid() == 0:
            user = _unprivileged()
            os.chown(folder, user.pw_uid, user.pw_gid)
            command += [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        password = secrets.token_hex(8)
        cluster = Cluster(binaries, folder, port, password, tuple(command))
        _initialise(cluster)
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()


def _initialise(cluster: Cluster) -> None:
    """Write the files of a new server, whose only user has a password."""
    password = cluster.folder / "password"
    password.write_text(cluster.password)
    password.chmod(0o644)
    options = {
        "pgdata": cluster.folder / "data",
        "username": "polyrex",
        "pwfile": password,
        "auth": "scram-sha-256",
        "encoding": "UTF8",
        # A database sorts text in its own language, unless a column says otherwise.
        "locale": "C",
        "locale-provider": "icu",
        "icu-locale": "en",
    }
    done = subprocess.run(
        [
            *cluster.user,
            cluster.binaries / "initdb",
            "--no-sync",
            *(f"--{name}={value}" for name, value in options.items()),
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)


def _unprivileged() -> pwd.struct_passwd:
    """Whoever runs the server where the tests run as root, which PostgreSQL refuses."""
    users = {user.pw_name: user for user in pwd.getpwall()}
    return users.get("postgres") or users["nobody"]
