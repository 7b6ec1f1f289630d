"""A server as a user starts it, and a client of a few lines."""

import http.client
import json
import pathlib
import queue
import subprocess
import threading
import time
from typing import Any

from tests.commands import command


class Server:
    """`eval.serve` on a port of its own; `lines` has what it prints."""

    def __init__(self, workdir: pathlib.Path, state: pathlib.Path, *arguments: str):
        self.process: subprocess.Popen = command(
            "eval.serve", f"--workdir={workdir}", f"--state={state}", "--port=0", *arguments
        )
        self.lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.printed: list[str] = []
        self.port = int(self.wait_for("are searched").split(":")[2])

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)

    def wait_for(self, words: str, timeout: float = 120) -> str:
        """The next line with some words."""
        limit = time.monotonic() + timeout
        while True:
            line = self.lines.get(timeout=max(0.1, limit - time.monotonic()))
            self.printed.append(line)
            if words in line:
                return line

    def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, answer and headers of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            names.setdefault("Content-Type", "application/json")
        connection.request(method, path, body, names)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if answer.headers.get_content_type() == "application/json":
            content = json.loads(content)
        return answer.status, content, dict(answer.headers)

    def post(self, path: str, **body: Any) -> Any:
        """The answer to a request that must succeed."""
        status, answer, _ = self.ask("POST", path, body)
        assert status == 200, answer
        return answer

    def metric(self, name: str) -> float:
        """One of the service's metrics."""
        _, text, _ = self.ask("GET", "/metrics")
        (line,) = [line for line in text.decode().splitlines() if line.startswith(f"{name} ")]
        return float(line.split()[-1])

    def stop(self) -> str:
        """Ends it as systemd does; returns what it printed."""
        self.process.terminate()
        self.process.wait(30)
        self._reader.join(10)
        while not self.lines.empty():
            self.printed.append(self.lines.get())
        return "".join(self.printed)
