"""Makes version1.db with the proxy of version 1 in the folder that is given: see version1.md."""

import http.client
import http.server
import json
import re
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

CHUNK = b'data: {"id":"1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"word "}}]}\n\n'


class Upstream(http.server.BaseHTTPRequestHandler):
    """Answers with a usage far above any hold, breaks, or streams a little and then hangs."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["model"] == "breaks":
            self.send_error(500)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if body.get("stream") else "application/json")
        self.end_headers()
        if body.get("stream"):
            for _ in range(40):
                self.wfile.write(CHUNK)
                self.wfile.flush()
            time.sleep(60)
        message = {"index": 0, "message": {"role": "assistant", "content": "word"}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 400, "completion_tokens": 100, "total_tokens": 500}
        self.wfile.write(json.dumps({"object": "chat.completion", "choices": [message], "usage": usage}).encode())

    def log_message(self, *args: Any) -> None:
        pass


def main(folder: Path) -> None:
    upstream = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    config = {
        "listen": "127.0.0.1:0",
        "free_credits": {"amount": 100, "days": 30},
        "tiers": {"free": {}},
        "upstreams": {"echo": {"builtin": "echo"}, "main": {"base_url": f"http://127.0.0.1:{upstream.server_port}/v1"}},
    }
    models: dict[str, Any] = {name: {"tier": "one", "upstream": "main"} for name in ("answers", "breaks")}
    models |= {"echo": {"tier": "one", "upstream": "echo"}}
    models["gift"] = {**models["echo"], "multiplier": 0}
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "models.yaml").write_text(json.dumps({"tiers": {"one": {"multiplier": 0.5}}, "models": models}))

    def command(*arguments: str) -> Any:
        program = [sys.executable, str(folder / "proxy.py"), *arguments, "--json"]
        return json.loads(subprocess.run(program, check=True, capture_output=True).stdout)

    server = subprocess.Popen([sys.executable, "-u", str(folder / "proxy.py")], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    port = int(next(m[1] for m in (re.search(r"listening on .*:(\d+)", line) for line in server.stdout) if m))
    waiting = []

    def call(key: str, model: str, text: str, stream: bool = False, wait: bool = True) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": stream, "max_tokens": 60}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Authorization": f"Bearer {key}"})
        waiting.append((connection, connection.getresponse()))  # its connection stays open
        if wait:
            waiting[-1][1].read()

    def let_lapse(account: str) -> None:
        db = sqlite3.connect(folder / "proxy.db")
        past = int(time.time() * 1000) - (0 if account == "held" else 86_400_000)
        db.execute("UPDATE account SET free_expires_at = ? WHERE name = ?", (past, account))
        db.commit()
        db.close()

    keys = {name: command("account", "add", name)["key"] for name in ("ann", "over", "lapse", "held", "open", "none")}
    command("credit", "add", "ann", "500", "--ref", "bill-1", "--note", "thanks")
    for model, words in (("echo", 100), ("gift", 30), ("echo", 120), ("echo", 5), ("echo", 7)):
        call(keys["ann"], model, "word " * words)
    call(keys["ann"], "breaks", "word")
    second = command("key", "add", "ann", "--label", "second")["key"]
    for stream in (False, True):
        call(second, "echo", "word " * 50, stream)
    command("credit", "add", "ann", "-12.5")
    call(keys["over"], "answers", "word")
    call(keys["lapse"], "echo", "word " * 20)
    let_lapse("lapse")
    command("credit", "add", "lapse", "50")
    call(keys["lapse"], "echo", "word " * 10)
    for name in ("held", "open", "open"):
        call(keys[name], "answers", "word", stream=True, wait=False)
    let_lapse("held")
    command("account", "suspend", "none")
    command("key", "revoke", str(command("key", "list", "none")[0]["key_id"]))
    server.kill()
    server.wait()
    db = sqlite3.connect(folder / "proxy.db")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    print(json.dumps(command("account", "list"), indent=1))
    print(json.dumps(command("audit"), indent=1))


main(Path(sys.argv[1]).resolve())
