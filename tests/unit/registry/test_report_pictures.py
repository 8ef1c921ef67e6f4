"""Which pictures there are, of which data; and the same as PNG files."""

import dataclasses

import pytest

from registry.records import Spectrum
from registry.report import pictures
from registry.report.curves import law_rps
from registry.report.drawing import as_png, as_svg
from registry.report.table import rows
from tests.doubles import campaigns, reports


def drawn(made: object, name: str) -> str:
    [found] = [one for one in pictures.pictures_of(made, rows(made)) if one.name == name]  # type: ignore[arg-type]
    return as_svg(found)


def test_a_picture_without_data_is_left_out() -> None:
    made = dataclasses.replace(campaigns.campaign(), capacities=(), verdict=campaigns.no_winner())
    assert [one.name for one in pictures.pictures_of(made, rows(made))] == ["pareto"]


def test_the_waterfall_names_levers_and_ratios() -> None:
    picture = drawn(reports.rich(), "waterfall")
    for word in ("artifact", "server", "baseline", "selected", "1.94×", "1.40×", "2.72×"):
        assert word in picture


def test_a_ladder_shows_its_knee_and_law() -> None:
    picture = drawn(reports.rich(), "throughput")
    assert "ringed: the knee" in picture
    assert "Universal Scalability Law" in picture
    bare = dataclasses.replace(reports.rich(), advice=())
    assert "Universal Scalability Law" not in drawn(bare, "throughput")


def test_the_law_is_that_of_the_fit() -> None:
    assert law_rps(reports.LAW, 1) == 620.0
    assert law_rps(reports.LAW, 8) == pytest.approx(620 * 8 / (1 + 0.41 * 7))


def test_a_spectrum_marks_only_percentiles_that_are_earned() -> None:
    made = reports.rich()
    assert ">99.9<" not in drawn(made, "spectrum")
    [first, *others] = made.spectra
    earned = Spectrum(
        candidate_id=first.candidate_id, load=first.load, requests=20_000, points=(*first.points, (99.9, 70.0))
    )
    assert ">99.9<" in drawn(dataclasses.replace(made, spectra=(earned, *others)), "spectrum")


def test_a_spectrum_of_another_load_is_not_drawn() -> None:
    made = reports.rich()
    other = tuple(dataclasses.replace(one, load="100 rps") for one in made.spectra)
    made = dataclasses.replace(made, spectra=other)
    assert "spectrum" not in [one.name for one in pictures.pictures_of(made, rows(made))]


def test_a_surface_has_a_panel_for_each_server_and_protocol() -> None:
    picture = drawn(reports.rich(), "surface-1")
    for words in ("mlserver, grpc", "mlserver, rest", "triton, grpc", "triton, rest"):
        assert words in picture


def test_a_search_that_measured_one_profile_is_no_surface() -> None:
    search = reports.search()
    assert pictures.surface_picture(dataclasses.replace(search, points=search.points[:1]), 1) is None


def test_png_files_are_the_same_pictures() -> None:
    made = dataclasses.replace(reports.rich(), capacities=(), serving_searches=(), spectra=())
    found = pictures.png_files(made)
    assert list(found) == ["waterfall.png", "pareto.png"]
    assert all(content.startswith(b"\x89PNG") for content in found.values())
    [first, *_] = pictures.pictures_of(made, rows(made))
    assert as_png(first) == found["waterfall.png"]
