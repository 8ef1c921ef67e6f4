"""The report's page in a real browser."""

import http.server
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.report.html import render_html
from tests.doubles import reports

pytestmark = pytest.mark.slow

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--hide-scrollbars",
)  # fmt: skip


class Serving(http.server.ThreadingHTTPServer):
    """Serves one page, and keeps the path of every request."""

    page = b""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[str] = []


class Answer(http.server.BaseHTTPRequestHandler):
    server: Serving

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(200 if self.path == "/report.html" else 404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        if self.path == "/report.html":
            self.wfile.write(self.server.page)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def serving() -> Iterator[Serving]:
    server = Serving()
    server.page = render_html(reports.rich()).encode()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    return found


def browse(chromium: str, profile: Path, *arguments: str) -> str:
    """What the browser prints; it goes to no host but loopback."""
    done = subprocess.run(
        [
            chromium, *QUIET, f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            *arguments,
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout


def test_the_page_shows_the_campaign_and_asks_for_nothing_else(chromium: str, serving: Serving, tmp_path: Path) -> None:
    made = reports.rich()
    dom = browse(chromium, tmp_path / "profile", "--dump-dom", f"http://127.0.0.1:{serving.server_port}/report.html")
    assert made.verdict.sentence in dom
    assert "Provisional" in dom
    for failure in made.failures:
        assert failure.reason in dom
    assert dom.count("<svg") == 6
    assert serving.asked == ["/report.html"]


@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_is_no_wider_than_the_window(chromium: str, tmp_path: Path, width: int) -> None:
    """Measured by a script beside the page, which has none of its own."""
    page = render_html(reports.rich())
    # The page forbids scripts, so this copy goes without its policy.
    start, end = page.index('<meta http-equiv="Content-Security-Policy"'), page.index('<link rel="icon"')
    measured = (
        page[:start] + page[end:].replace(
            "</body>",
            "<script>document.title = [document.documentElement.scrollWidth, innerWidth,"
            "[...document.querySelectorAll('svg.picture')].every(e => e.getBBox().width > 100)"
            " && (e => e.scrollWidth <= e.clientWidth)(document.querySelector('.results')),"
            "getComputedStyle(document.querySelector('svg[aria-labelledby^=latency] [style*=\"--series-0\"]')).stroke]"
            ".join('|')"
            "</script></body>",
        )
    )  # fmt: skip
    path = tmp_path / "report.html"
    path.write_text(measured, encoding="utf-8")
    dom = browse(chromium, tmp_path / "profile", f"--window-size={width},2600", "--dump-dom", path.as_uri())
    title = dom[dom.index("<title>") + len("<title>") : dom.index("</title>")]
    page_width, window_width, drawn, stroke = title.split("|")
    assert int(page_width) <= int(window_width)
    assert drawn == "true"
    assert stroke == "rgb(0, 114, 178)"


def test_a_screenshot_is_taken(chromium: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render_html(reports.rich()), encoding="utf-8")
    picture = tmp_path / "report.png"
    browse(chromium, tmp_path / "profile", "--window-size=1200,2600", f"--screenshot={picture}", path.as_uri())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 50_000
