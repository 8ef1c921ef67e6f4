"""How large report.html of 40 candidates is, and how soon a browser paints it.

    python benchmarks/report_size.py

A made-up campaign: four kinds of candidate over serving profiles, with ladders, stages, spectra, eight rounds, two
searches for a serving profile, rejections with reasons, and a champion. The page is opened in headless Chromium, each
time with a profile of its own, from a server on loopback. A script that is added for the purpose, as the page has none
and forbids any, tells when the browser first painted: ``first-contentful-paint`` of the W3C's Paint Timing, from the
start of navigation. What it takes a browser to start is not in it.
"""

import http.server
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from figures import figure, finish, say

from registry.records import Campaign, Candidate, Comparison, Measurement, Rejection, Round
from registry.report.html import render_html
from tests.doubles import campaigns, reports

CANDIDATES = 40
REPEATS = 5
TIMEOUT_S = 60
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
)  # fmt: skip
_PROBE = b"""<script>
new PerformanceObserver(list => {
  for (const one of list.getEntries())
    if (one.name === 'first-contentful-paint') navigator.sendBeacon('/painted/' + one.startTime);
}).observe({type: 'paint', buffered: true});
</script></head>"""


class Serving(http.server.ThreadingHTTPServer):
    """Serves the page, and hears when it was painted."""

    def __init__(self, page: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.page = page
        self.painted: queue.Queue[float] = queue.Queue()


class Answer(http.server.BaseHTTPRequestHandler):
    """Whatever is asked for is the page; what is sent says when it was painted."""

    server: Serving

    def do_GET(self) -> None:
        self._answer(self.server.page)

    def do_POST(self) -> None:
        self._answer(b"")
        self.server.painted.put(float(self.path.rpartition("/")[2]))

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def campaign(count: int = CANDIDATES) -> Campaign:
    """The doubles' campaign, grown to so many candidates."""
    made = reports.rich(level="standard")
    patterns = made.candidates
    law = {one.candidate_id: one for one in made.capacities}
    advice = {one.candidate_id: one for one in made.advice}
    spectra = {one.candidate_id: one for one in made.spectra}
    candidates: list[Candidate] = []
    parts: dict[str, list[object]] = {name: [] for name in ("capacities", "advice", "spectra")}
    measurements: list[Measurement] = []
    rounds: list[Round] = []
    comparisons: list[Comparison] = []
    rejections: list[Rejection] = []
    for number in range(count):
        pattern = patterns[number % len(patterns)]
        identity = pattern.id if number < len(patterns) else f"{number:016x}"
        serving = replace(pattern.serving, max_batch_size=2 ** (number // len(patterns) % 6), threads=1 + number // 24)
        named = replace(pattern, id=identity, serving=serving, name=f"{pattern.variant_name} @ {serving.key}-{number}")
        candidates.append(named if number >= len(patterns) else pattern)
        parts["capacities"].append(replace(law[pattern.id], candidate_id=identity))
        parts["advice"].append(replace(advice[pattern.id], candidate_id=identity))
        parts["spectra"].append(replace(spectra[pattern.id], candidate_id=identity))
        measurements += [
            replace(one, candidate_id=identity) for one in made.measurements if one.candidate_id == pattern.id
        ]
        rounds += [
            replace(one, candidate_id=identity, number=repeat)
            for repeat in range(8)
            for one in made.rounds
            if one.candidate_id == pattern.id and one.number == 1
        ]
        comparisons += [
            replace(one, candidate_id=identity) for one in made.comparisons if one.candidate_id == pattern.id
        ]
        rejections += [
            replace(one, candidate_id=identity, candidate_name=named.name)
            for one in made.verdict.rejections
            if one.candidate_id == pattern.id
        ]
    search = made.serving_searches[0]
    points = tuple(
        replace(point, profile=replace(point.profile, max_batch_delay_ms=delay, threads=threads))
        for point in search.points
        for delay in (1.0, 2.0)
        for threads in (1, 2)
    )
    return replace(
        made,
        candidates=tuple(candidates),
        measurements=tuple(measurements),
        rounds=tuple(rounds),
        comparisons=tuple(comparisons),
        failures=made.failures * 5,
        rendered={
            campaigns.STATIC_TRITON.id: {"config.pbtxt": "max_batch_size: 8\n" * 40, "model.py": "# code\n" * 300}
        },
        serving_searches=(replace(search, points=points), replace(search, points=points, variant_name="float32")),
        verdict=replace(made.verdict, rejections=tuple(rejections)),
        **{name: tuple(found) for name, found in parts.items()},  # type: ignore[arg-type]
    )


def paint_ms(chromium: str, page: str) -> float:
    """When the browser first painted something of the page, in ms from the start of navigation."""
    start, end = page.index('<meta http-equiv="Content-Security-Policy"'), page.index('<link rel="icon"')
    serving = Serving((page[:start] + page[end:]).encode().replace(b"</head>", _PROBE, 1))
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="burnish-browser-", ignore_cleanup_errors=True) as profile:
        # With a port for debugging it stays open until it is ended.
        browser = subprocess.Popen(
            [
                chromium, *QUIET, f"--user-data-dir={profile}", "--window-size=1200,900", "--remote-debugging-port=0",
                f"http://127.0.0.1:{serving.server_port}/report.html",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            return serving.painted.get(timeout=TIMEOUT_S)
        finally:
            browser.terminate()
            browser.wait(TIMEOUT_S)
            serving.shutdown()
            serving.server_close()


def main() -> None:
    made = campaign()
    begin = time.perf_counter()
    page = render_html(made)
    say(f"{len(made.candidates)} candidates, {len(made.rounds)} rounds: written in {time.perf_counter() - begin:.1f} s")
    met = [figure("report_html_mb", len(page.encode()) / 1e6, "<= 3.0")]
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        say("no chromium on this machine, so that nothing paints: apt-get install chromium")
        finish(False)
        return
    times = [paint_ms(chromium, page) for _ in range(REPEATS)]
    say(f"first contentful paint, ms: {', '.join(f'{one:.0f}' for one in times)}")
    met.append(figure("report_first_paint_s", statistics.median(times) / 1000, "<= 2.0"))
    finish(*met)


if __name__ == "__main__":
    main()
