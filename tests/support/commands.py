"""`python proxy.py COMMAND`: as a user runs it, and quickly.

The tests run hundreds of commands, and a start takes a hundred times longer than what most of them do: so one process
that has imported proxy.py runs them all, as `python proxy.py ARGUMENTS` would.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.waiting import WAIT_SECONDS

REPOSITORY = Path(__file__).resolve().parents[2]
PROXY = REPOSITORY / "proxy.py"

COMMAND_SERVER = """
import functools, json, os, sys, traceback
sys.path[0] = sys.argv[1]
import proxy
from extras import commands
proxy.msgspec.structs.fields = functools.cache(proxy.msgspec.structs.fields)  # this and the next are most of a command
build, once = commands.build_parser, functools.cache(commands.build_parser)
commands.build_parser = lambda settings: build(settings) if settings else once(None)
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    order = json.loads(line)
    for number, name in ((1, order["stdout"]), (2, order["stderr"])):
        output = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(output, number)
        os.close(output)
    sys.argv = ["proxy.py", *order["arguments"]]
    status = 1
    try:
        status = proxy.main() or 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    print(status, file=answers, flush=True)
"""


class CommandServer:
    """Runs `proxy.py ARGUMENTS`, quickly."""

    def __init__(self, folder: Path) -> None:
        self._outputs = (folder / "command.out", folder / "command.err")
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMAND_SERVER, str(REPOSITORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=proxy_environment(),
        )

    def run(self, *arguments: str, stdout: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A command with its exit code and outputs; with `stdout`, what it says goes there."""
        with self._lock:
            assert self._process.stdin is not None and self._process.stdout is not None
            said, stderr = self._outputs
            stdout = stdout or said
            order = {"arguments": arguments, "stdout": str(stdout), "stderr": str(stderr)}
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
            output = said.read_text() if stdout == said else ""
            return subprocess.CompletedProcess(list(arguments), code, output, stderr.read_text())

    def stop(self) -> None:
        self._process.communicate(timeout=WAIT_SECONDS)


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of this machine's user must not decide a test."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV") if name in os.environ}
    return {**kept, **(extra or {})}


def proxy_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a proxy under test. It speaks to nobody by TLS, and to read the certificates of all
    authorities is a sixth of its start."""
    return clean_environment({"SSL_CERT_FILE": os.devnull, **(extra or {})})


def run_program(config: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> Any:
    """`python proxy.py --config FILE ARGUMENTS`, to its end, exactly as a user runs it."""
    command = [sys.executable, str(PROXY), "--config", str(config), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        env=proxy_environment(environment),
        cwd=config.parent,
    )
