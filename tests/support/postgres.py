"""A PostgreSQL server for the tests, and a fresh database a proxy.

With PROXY_TEST_DATABASE=postgres in the environment every proxy of the suite is on PostgreSQL: `write_files` asks
`database_for` what stands in config.yaml. The server is Debian's, or PATH's, in a temporary folder; there is one a run,
started when the first database is asked for.
"""

import atexit
import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WANTED = os.environ.get("PROXY_TEST_DATABASE") == "postgres"
SETTINGS = """
listen_addresses = '127.0.0.1'
max_connections = 300
shared_buffers = 64MB
log_min_messages = fatal
"""


def binaries() -> Path | None:
    """The folder of initdb and pg_ctl."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), key=lambda path: int(path.parts[-3]))
    in_path = shutil.which("pg_ctl")
    return found[-1].parent if found else Path(in_path).parent if in_path else None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class PostgresServer:
    """A server that a test may stop, kill and start again."""

    def __init__(self, fsync: bool = False) -> None:
        """Without `fsync` a crash of the server can be tested, and none of the machine."""
        folder = binaries()
        if folder is None:
            pytest.skip("needs PostgreSQL's server: apt-get install postgresql")
        pytest.importorskip("psycopg", reason="needs psycopg: pip install -e '.[postgres]'")
        self.binaries = folder
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="proxy-postgres-"))
        self.names = itertools.count(1)
        if os.getuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")
        self.run("initdb", "-D", "data", "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")
        settings = f"{SETTINGS}fsync = {'on' if fsync else 'off'}\nport = {self.port}\n"
        settings += f"unix_socket_directories = '{self.folder}'\n"
        with (self.folder / "data" / "postgresql.conf").open("a") as file:
            file.write(settings)
        self.start()

    def run(self, program: str, *arguments: str) -> None:
        """A program of PostgreSQL's, which does not run as root."""
        become = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
        command = [*become, str(self.binaries / program), *arguments]
        with (self.folder / "out").open("wb") as out:
            done = subprocess.run(command, stdout=out, stderr=out, cwd=self.folder, timeout=60)
        assert done.returncode == 0, (self.folder / "out").read_text()

    def start(self) -> None:
        self.run("pg_ctl", "-D", "data", "-l", "log", "-w", "start")

    def stop(self, mode: str = "fast") -> None:
        self.run("pg_ctl", "-D", "data", "-m", mode, "-w", "stop")

    def restart(self) -> None:
        self.run("pg_ctl", "-D", "data", "-l", "log", "-m", "fast", "-w", "restart")

    def url(self, name: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    def url_of_socket(self, name: str) -> str:
        return f"postgresql://postgres@/{name}?host={self.folder}&port={self.port}"

    def new_name(self) -> str:
        """The name of an empty database."""
        name = f"proxy_{next(self.names)}"
        with connected(self.url("postgres")) as db:
            db.execute(f"CREATE DATABASE {name}")
        return name

    def new_database(self) -> str:
        """The URL of an empty database."""
        return self.url(self.new_name())

    free_port = staticmethod(free_port)

    def close(self) -> None:
        with contextlib.suppress(AssertionError):
            self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)


_servers: list[PostgresServer] = []


def the_server() -> PostgresServer:
    """The one of this run."""
    if not _servers:
        _servers.append(PostgresServer())
        atexit.register(_servers[0].close)
    return _servers[0]


@contextlib.contextmanager
def connected(url: str) -> Iterator[Any]:
    """psycopg's own connection, which knows nothing of the proxy."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as db:
        yield db


def database_for(folder: Path, database: str) -> str:
    """What stands in the config.yaml of this folder: PostgreSQL if this run is on it."""
    return the_server().new_database() if WANTED and database == "proxy.db" else database
