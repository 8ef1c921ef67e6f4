"""The report's page: complete, self-contained, safe and the same each time."""

import dataclasses
import html
import importlib.resources
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from registry.records import Campaign, Failure
from registry.report import pictures
from registry.report.drawing import as_svg
from registry.report.html import render_html
from registry.report.table import rows
from tests.doubles import campaigns, reports

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Collects what a browser would: text, tags, ids and addresses; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._keep(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._keep(attrs)

    def _keep(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            self.attributes.append((name, value or ""))
            if name == "id":
                self.ids.append(value or "")
            if name in {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}:
                self.addresses.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render_html(reports.rich()))


def test_the_page_tells_the_whole_campaign(page: Page) -> None:
    made = reports.rich()
    assert made.verdict.sentence in page.text
    assert "Provisional" in page.text
    for candidate in made.candidates:
        assert candidate.variant_name in page.text
    for one in (*made.verdict.rejections, *made.failures):
        assert one.reason in page.text
    for fact in (made.host.cpu_model, made.host.fingerprint, made.host.pinning, made.id, made.samples_digest):
        assert fact in page.text
    for constraint in made.verdict.policy.constraints:
        assert constraint.text in page.text
    assert "not known" in page.text
    assert "closed loop, 8 outstanding" in page.text
    assert "Poisson" in page.text


def test_the_page_counts_what_each_candidates_numbers_leave_out() -> None:
    made = campaigns.campaign()
    closed = [
        dataclasses.replace(one, invalid_runs=2)
        if one.candidate_id == campaigns.OPENVINO_TRITON.id and one.load is None
        else one
        for one in made.measurements
    ]
    text = html.unescape(render_html(dataclasses.replace(made, measurements=tuple(closed))))
    assert "2. openvino @ triton-grpc-b8-d2: 2 in a closed loop, 1 at 0.8 saturation; 3. int8-static" in text
    assert "4. float32 @ mlserver-grpc-b8-d2: none" in text


def test_the_page_asks_the_network_for_nothing(page: Page) -> None:
    html = render_html(campaigns.campaign())
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert not re.search(r"""url\(\s*['"]?(?!#)""", html)
    assert "@import" not in html
    assert "http://" not in html
    assert "https://" not in html
    assert not {"script", "iframe", "object", "embed", "img"} & set(page.tags)


def test_references_inside_the_page_resolve_and_ids_are_unique(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    used = {address[1:] for address in page.addresses if address.startswith("#")}
    for name, value in page.attributes:
        used |= set(re.findall(r"url\(#([^)]+)\)", value))
        if name == "aria-labelledby":
            used |= set(value.split())
    assert used
    assert used <= set(page.ids)


def test_the_page_is_the_same_each_time() -> None:
    assert render_html(reports.rich()) == render_html(reports.rich())


def test_only_quick_is_provisional() -> None:
    assert "Provisional" not in Page(render_html(campaigns.campaign(level="standard"))).text


def test_what_nearly_passed_is_shown_where_nothing_did() -> None:
    made = dataclasses.replace(campaigns.campaign(), verdict=campaigns.no_winner())
    text = Page(render_html(made)).text
    assert "accuracy_drop <= 0.0044 would admit it" in text
    assert "selected" not in {row.outcome for row in rows(made)}


HOSTILE = '"><script>alert(1)</script><img src=http://e.org/x.png onerror=y>&\u202e\x1b[2J$\\frac{1}'


def hostile() -> Campaign:
    """The campaign with a hostile text in every place that takes one from outside."""

    def spoil(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            changes = {
                field.name: spoil(getattr(value, field.name))
                for field in dataclasses.fields(value)
                if field.name not in KEPT
            }
            return dataclasses.replace(value, **changes)
        if isinstance(value, tuple):
            return tuple(spoil(item) for item in value)
        if isinstance(value, dict):
            return {key: spoil(item) for key, item in value.items()}
        return f"{value}{HOSTILE}" if isinstance(value, str) else value

    # What other records refer to, and what the records' types hold to fixed words, stays.
    KEPT = {"id", "candidate_id", "variant_id", "baseline_id", "baseline", "selected", "unknown", "pareto", "metric"}
    KEPT |= {"kind", "phase", "server", "backend", "protocol", "word", "outcome", "format", "precision", "graph_level"}
    KEPT |= {"op", "direction", "unit", "method", "arrivals", "load", "engine"}
    return spoil(reports.rich())


@pytest.mark.filterwarnings("error")
def test_what_comes_from_outside_is_shown_and_never_acted_on() -> None:
    made = hostile()
    html = render_html(made)
    page = Page(html)
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert "<script>alert(1)</script>" in page.text
    assert "\x1b" not in html
    assert "\u202e" not in html


def test_a_name_in_any_script_is_drawn_without_a_word() -> None:
    made = campaigns.campaign()
    named = tuple(dataclasses.replace(one, name=f"模型 {one.name}") for one in made.candidates)
    made = dataclasses.replace(made, candidates=named)
    drawn = pictures.latency_picture(made, rows(made))
    assert drawn is not None
    assert "模型" in as_svg(drawn)


def test_pictures_are_well_formed_and_say_what_they_show() -> None:
    made = reports.rich()
    found = pictures.pictures_of(made, rows(made))
    names = ["waterfall", "pareto", "latency", "throughput", "spectrum", "surface-1"]
    assert [one.name for one in found] == names
    for picture in map(as_svg, found):
        root = ElementTree.fromstring(picture.replace("<svg", '<svg xmlns:xlink="x"', 1))
        assert root.find("title") is not None
        assert root.find("desc") is not None
        assert root.get("role") == "img"
        # Every colour comes from the page, so that light and dark both work.
        assert re.findall(r"#[0-9a-fA-F]{6}", picture) == []
        assert "var(--series-0)" in picture


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    render_html(campaigns.campaign())
    assert dict(mpl.rcParams) == before


def test_what_judging_noted_stands_with_the_variant_once() -> None:
    made = campaigns.campaign()
    note = "the slice with the largest drop is <night>"
    judged = [dataclasses.replace(one, notes=(note,)) for one in made.fidelities]
    page = Page(render_html(dataclasses.replace(made, fidelities=(*judged, *judged))))
    assert page.text.count(f"onnxruntime: {note}") == len([one for one in judged if one.engine.name == "onnxruntime"])


def test_nothing_measured_gives_a_page_without_pictures() -> None:
    made = campaigns.campaign()
    verdict = dataclasses.replace(campaigns.no_winner(), baseline=None, rejections=(), unknown=(), closest=())
    bare = dataclasses.replace(
        made,
        candidates=(),
        capacities=(),
        rounds=(),
        measurements=(),
        comparisons=(),
        fidelities=(),
        verdict=verdict,
        failures=(Failure(subject="digits", phase="source", kind="error", reason="not an ONNX file"),),
    )
    page = Page(render_html(bare))
    assert "No candidate was served" in page.text
    assert "svg" not in page.tags


def test_many_candidates_stay_readable_and_small() -> None:
    made = campaigns.campaign()
    candidates, capacities = [], []
    for number in range(40):
        pattern, law = made.candidates[number % 4], made.capacities[number % 4]
        candidates.append(dataclasses.replace(pattern, id=f"{number:016x}", name=f"{pattern.name} {number}"))
        capacities.append(dataclasses.replace(law, candidate_id=f"{number:016x}"))
    verdict = dataclasses.replace(made.verdict, baseline=f"{39:016x}", selected=None)
    made = dataclasses.replace(made, candidates=tuple(candidates), capacities=tuple(capacities), verdict=verdict)
    html = render_html(made)
    assert len(html) < 3_000_000
    assert "32 more candidates are in the table only" in html
    # The baseline is drawn however many come before it.
    drawn = pictures.latency_picture(made, rows(made))
    assert drawn is not None
    assert "(baseline)" in as_svg(drawn)


def test_the_template_is_in_the_package() -> None:
    folder = importlib.resources.files("registry.report")
    assert folder.joinpath("page.html").is_file()
    assert folder.joinpath("page.css").is_file()
