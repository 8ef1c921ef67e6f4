"""A proxy before a real tracking server that makes it slow, refuse, fail, or go away."""

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

# What a rule says of a request: nothing, status and text of the answer, or an end of the connection without one: before
# the server sees it, or after.
Answer = tuple[int, str] | None
GONE: Answer = (0, "")
LOST: Answer = (0, "passed on")
_NOT_PASSED_ON = {"connection", "transfer-encoding", "content-length", "keep-alive"}


@dataclass
class TrackingProxy:
    """Passes requests on to ``upstream``, except where the rule answers them.

    Attributes:
        upstream: the real server's URL.
        delay_s: how long each request waits first.
        rule: told the method, the path and how many requests came before.
        asked: method and path of each request, in their order.
        headers: those of the last request.
    """

    upstream: str
    delay_s: float = 0.0
    rule: Callable[[str, str, int], Answer] | None = None
    asked: list[tuple[str, str]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    url: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answers one request."""
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        with self._lock:
            number = len(self.asked)
            self.asked.append((handler.command, handler.path))
            self.headers = dict(handler.headers)
        time.sleep(self.delay_s)
        said = self.rule(handler.command, handler.path, number) if self.rule is not None else None
        if said in {GONE, LOST}:
            if said == LOST:
                self._passed_on(handler, body)
            handler.close_connection = True
            with contextlib.suppress(OSError):
                handler.connection.shutdown(socket.SHUT_RDWR)
            return
        status, headers, content = self._passed_on(handler, body) if said is None else (said[0], [], said[1].encode())
        handler.send_response(status)
        for name, value in headers:
            if name.lower() not in _NOT_PASSED_ON:
                handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def _passed_on(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        parts = urlsplit(self.upstream)
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60)
        try:
            headers = {name: value for name, value in handler.headers.items() if name.lower() not in _NOT_PASSED_ON}
            headers["Host"] = parts.netloc
            connection.request(handler.command, handler.path, body=body, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


@contextmanager
def proxied(upstream: str, **settings: Any) -> Iterator[TrackingProxy]:
    """A proxy before the server at ``upstream``, on a port of its own, as long as the context lasts."""
    proxy = TrackingProxy(upstream, **settings)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            return

        def _any(self) -> None:
            proxy.answer(self)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _any

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()
