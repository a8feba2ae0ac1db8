"""The servers that are measured: how each is started in front of the scripted upstream, one process each.

The proxy, in whatever version and with whatever options, is in `proxies.py`; here are those it is compared with. A
contestant that is not installed is left out. All of them write to files in the bench's temporary directory, and none
outlives the bench: the kernel kills each when the bench dies, however it dies.
"""

import ctypes
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PR_SET_PDEATHSIG = 1
START_SECONDS_MAX = 90  # LiteLLM takes about 20 on a small machine
LIBC = ctypes.CDLL(None)


def free_port() -> int:
    """A port that nobody listens on; nobody else on this machine is expected to take it within the second."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def say(words: str) -> None:
    """Report progress on stderr; stdout is for the table."""
    print(words, file=sys.stderr, flush=True)


def die_with_parent() -> None:
    """Have the kernel kill this child when the bench is gone."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def running(arguments: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command while the block lasts; at its end the group gets SIGTERM, and three seconds later SIGKILL."""
    with log.open("ab") as output:
        options = {"stdout": output, "stderr": output, **options}
        process = subprocess.Popen(arguments, start_new_session=True, preexec_fn=die_with_parent, **options)
    try:
        yield process
    finally:
        for signal_number, seconds in ((signal.SIGTERM, 3), (signal.SIGKILL, 10)):
            try:
                os.killpg(process.pid, signal_number)
                process.wait(seconds)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        process.wait()


def process_tree(pid: int) -> list[int]:
    """This process and all its descendants."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in children.read_text().split()]
    return found


@dataclass
class Contestant:
    """A server under test: where it listens, what a request needs, and what it has used."""

    name: str
    port: int
    process: subprocess.Popen[bytes] | None = None
    key: str = "none"
    model: str = "bench"
    started_seconds: float = 0.0

    def tree(self) -> list[int]:
        """The ids of its processes."""
        assert self.process
        return process_tree(self.process.pid)

    def ended(self) -> str:
        """How it ended, if it did: then no load was too much for it."""
        status = self.process.poll() if self.process else None
        return "" if status is None else f"its process has ended with status {status}: "

    def cpu_seconds(self) -> float:
        """CPU time of the process tree so far, all threads.

        Read from the kernel's CPU clock of each process (clock_getcpuclockid(3)). It is the same count of nanoseconds
        as in /proc/PID/task/*/schedstat, but it keeps the share of threads that have ended, which schedstat loses.
        """
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in self.tree())

    def wait_until_idle(self, seconds: float = 20) -> None:
        """Wait until it is done with what it was left with: less than a tenth of a core for half a second."""
        deadline = time.monotonic() + seconds
        while not self.ended() and time.monotonic() < deadline:
            before = self.cpu_seconds()
            time.sleep(0.5)
            if self.cpu_seconds() - before < 0.05:
                return

    def resident_mb(self) -> float:
        """Resident memory of the process tree; pages that two of its processes share count twice."""
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.tree())
        return pages * os.sysconf("SC_PAGESIZE") / 1e6

    def request(self, text: str, *, stream: bool = False, content: object = None) -> bytes:
        """A whole HTTP request for a chat completion; `text` tells the scripted upstream how to answer."""
        messages = [{"role": "system", "content": text}, {"role": "user", "content": content or QUESTION}]
        body: dict[str, object] = {"model": self.model, "messages": messages, "temperature": 0.7}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        encoded = json.dumps(body).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nAccept: */*\r\n"
            f"User-Agent: bench\r\nContent-Type: application/json\r\nAuthorization: Bearer {self.key}\r\n"
            f"Content-Length: {len(encoded)}\r\n\r\n"
        )
        return head.encode() + encoded

    def answers(self) -> bool:
        """True if a request gets status 200."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(self.request("[events=0 pace_ms=0]"))
                return connection.recv(64).startswith(b"HTTP/1.1 200")
        except OSError:
            return False


QUESTION = (
    "Please explain in a few sentences how a reverse proxy relays a stream of server-sent events, why it must not "
    "wait for the end of an answer before it sends the first byte on, and what it has to do when the reader is slow. "
    "Then give the answer to the question of life, the universe and everything, and the reason for it."
)


@contextmanager
def started(contestant: Contestant, arguments: list[str], directory: Path, **options: Any) -> Iterator[Contestant]:
    """Run a contestant; the block begins when it has answered its first request."""
    log = directory / "log.txt"
    begin = time.monotonic()
    with running(arguments, log, cwd=directory, **options) as process:
        contestant.process = process
        while not contestant.answers():
            if process.poll() is not None or time.monotonic() > begin + START_SECONDS_MAX:
                raise RuntimeError(f"{contestant.name} did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.01)
        contestant.started_seconds = time.monotonic() - begin
        yield contestant


@contextmanager
def pass_through(upstream_port: int, directory: Path) -> Iterator[Contestant]:
    """The bare aiohttp pass-through of `tests/bench/passthrough.py`."""
    port = free_port()
    arguments = [sys.executable, str(HERE / "passthrough.py"), str(port), f"http://127.0.0.1:{upstream_port}/v1"]
    with started(Contestant("pass-through", port), arguments, directory) as contestant:
        yield contestant


NGINX = """
daemon off; master_process off; worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/error.log;
worker_rlimit_nofile 16384;
events {{ worker_connections 8192; }}
http {{
    access_log off; client_max_body_size 64m; client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi; uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
    keepalive_requests 1000000000;
    upstream bench {{ server 127.0.0.1:{upstream_port}; keepalive 4096; keepalive_requests 1000000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://bench; proxy_buffering off; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_read_timeout 600s;
        }}
    }}
}}
"""


@contextmanager
def nginx(upstream_port: int, directory: Path) -> Iterator[Contestant]:
    """nginx without buffering, as one process: its master would only wait."""
    port = free_port()
    configuration = directory / "nginx.conf"
    configuration.write_text(NGINX.format(directory=directory, port=port, upstream_port=upstream_port))
    arguments = [nginx_executable() or "", "-c", str(configuration), "-p", str(directory)]
    with started(Contestant("nginx", port), arguments, directory) as contestant:
        yield contestant


def nginx_executable() -> str | None:
    """Debian keeps it in a directory that is not on everybody's path."""
    return shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


@contextmanager
def litellm(upstream_port: int, directory: Path) -> Iterator[Contestant]:
    """LiteLLM's proxy with one worker and no database: it checks one key, the master key, and books nothing."""
    port = free_port()
    parameters = {"model": "openai/bench", "api_base": f"http://127.0.0.1:{upstream_port}/v1", "api_key": "none"}
    configuration = directory / "litellm.yaml"  # JSON is YAML
    configuration.write_text(json.dumps({"model_list": [{"model_name": "bench", "litellm_params": parameters}]}))
    executable = str(Path(sys.executable).with_name("litellm"))
    arguments = [executable, "--config", str(configuration), "--host", "127.0.0.1", "--port", str(port)]
    key = "sk-" + secrets.token_hex(32)
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": key}
    with started(Contestant("LiteLLM", port, key=key), arguments, directory, env=environment) as contestant:
        yield contestant


Starter = Callable[[int, Path], AbstractContextManager[Contestant]]
OTHERS: dict[str, Starter] = {"pass-through": pass_through, "nginx": nginx, "LiteLLM": litellm}


def installed() -> list[str]:
    """The gateways that can run here beside the proxy."""
    present = {
        "pass-through": importlib.util.find_spec("uvloop") is not None,
        "nginx": nginx_executable() is not None,
        "LiteLLM": Path(sys.executable).with_name("litellm").exists(),
    }
    return [name for name, here in present.items() if here]
