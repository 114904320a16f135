"""A server on loopback that answers by a script, and keeps what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Answer:
    """Status, content (an object becomes JSON; bytes go out as they are), seconds to wait, and further headers.

    ``length`` is the content's length as the server claims it to be.
    """

    status: int = 200
    content: Any = None
    wait: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None


@dataclass
class Served:
    url: str
    asked: list[tuple[str, dict[str, Any] | None, dict[str, str]]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [body for _, body, _ in self.asked if body is not None]


def completion(text: str, finish_reason: str = "stop", **further: Any) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": finish_reason, **further}]}


def said(text: str | None, finish_reason: str = "stop", **further: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}, "finish_reason": finish_reason, **further}]}


@contextmanager
def serve(answer: Callable[[str, dict[str, Any] | None, int], Answer | dict[str, Any]]) -> Iterator[Served]:
    """Serves ``answer(path, body, how many requests there were before)``."""
    lock = threading.Lock()
    let_go = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(None)

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body: dict[str, Any] | None) -> None:
            with lock:
                number = len(served.asked)
                served.asked.append((self.path, body, dict(self.headers)))
                served.at_once += 1
                served.most_at_once = max(served.most_at_once, served.at_once)
            found = answer(self.path, body, number)
            found = found if isinstance(found, Answer) else Answer(content=found)
            let_go.wait(found.wait)
            content = found.content if isinstance(found.content, bytes) else json.dumps(found.content).encode()
            with lock:
                served.at_once -= 1
            try:
                self.send_response(found.status)
                for name, value in found.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(found.length or len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # whoever asked has gone

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Served(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        let_go.set()
        server.shutdown()
        server.server_close()
        thread.join()
