"""A double of an S3 server that knows the condition If-None-Match, as S3 itself does and rclone's server does not.

It can also be away, or overloaded, for all or for some of those who ask. It keeps small objects of one bucket,
``models``, in memory, and looks at no signature. Answers are written from S3's API reference.
"""

import hashlib
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_DATE = "Sun, 22 Nov 2026 12:00:00 GMT"


class ConditionalS3:
    """The server. A context manager.

    Attributes:
        objects: key -> content.
        lost: how many answers to PUT are lost, after the work was done.
        instead: told the access key of whoever asks, it may give status and code of the answer; status 0 for none.
        asked: how many requests came.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.lost = 0
        self.instead: Callable[[str], tuple[int, str] | None] = lambda key: None
        self.asked = 0
        self.lock = threading.Lock()

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"double": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    double: ConditionalS3

    def log_message(self, *_: Any) -> None:
        pass

    @property
    def key(self) -> str:
        return unquote(urlsplit(self.path).path).removeprefix("/models").removeprefix("/")

    def is_refused(self) -> bool:
        """Whether the request was answered in another way than it should be."""
        self.double.asked += 1
        answer = self.double.instead(self.headers["Authorization"].partition("Credential=")[2].partition("/")[0])
        if answer is None:
            return False
        if answer[0]:
            self.refuse(*answer)
        else:
            self.close_connection = True
        return True

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.is_refused():
            return
        with self.double.lock:
            if self.headers.get("If-None-Match") == "*" and self.key in self.double.objects:
                self.refuse(412, "PreconditionFailed")
                return
            self.double.objects[self.key] = content
            lost, self.double.lost = self.double.lost > 0, max(0, self.double.lost - 1)
        if lost:
            self.close_connection = True
            return
        self.answer(200, b"", etag=hashlib.md5(content).hexdigest())

    def do_GET(self) -> None:
        if self.is_refused():
            return
        if not self.key:
            self.list(parse_qs(urlsplit(self.path).query))
            return
        content = self.double.objects.get(self.key)
        if content is None:
            self.refuse(404, "NoSuchKey")
            return
        etag = hashlib.md5(content).hexdigest()
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            self.answer(206, content[int(first) : int(last) + 1], etag=etag)
        else:
            self.answer(200, content, etag=etag)

    do_HEAD = do_GET

    def do_DELETE(self) -> None:
        if self.is_refused():
            return
        with self.double.lock:
            self.double.objects.pop(self.key, None)
        self.answer(204, b"")

    def list(self, query: dict[str, list[str]]) -> None:
        prefix = query.get("prefix", [""])[0]
        with self.double.lock:
            found = {key: len(content) for key, content in self.double.objects.items() if key.startswith(prefix)}
        items = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-11-22T12:00:00.000Z</LastModified>"
            f'<ETag>"x"</ETag><Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>'
            for key, size in sorted(found.items())
        )
        text = f"<ListBucketResult><Name>models</Name><IsTruncated>false</IsTruncated>{items}</ListBucketResult>"
        self.answer(200, text.encode())

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

    def answer(self, status: int, content: bytes, *, etag: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Last-Modified", _DATE)
        if etag:
            self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
