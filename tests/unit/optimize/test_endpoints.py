"""Endpoints as a command line names them."""

from pathlib import Path
from typing import Any

import pytest

from optimize.endpoints import check_amounts, check_seed, endpoint, make_folder
from profiles.testing import FakeV2Server
from registry.errors import InputError, UnreachableError


@pytest.mark.parametrize(
    ("url", "tls", "expected"),
    [
        ("host:1", False, ("host:1", False)),
        ("grpc://host:1/", False, ("host:1", False)),
        ("grpcs://host:1", False, ("host:1", True)),
        ("host:1/prefix/", True, ("host:1/prefix", True)),
    ],
)
def test_an_address_without_http_is_of_grpc(url: str, tls: bool, expected: tuple[str, bool]) -> None:
    target = endpoint(url, "m", None, ["seldon-model=m", "a=b=c"], tls)
    assert (target.url, target.tls) == expected
    assert (target.protocol, target.packed, target.binary) == ("grpc", False, False)
    assert target.headers == {"seldon-model": "m", "a": "b=c"}


def test_http_before_an_address_is_rest() -> None:
    with FakeV2Server() as server:
        url = server.target("rest").url
        for named in ((f"http://{url}", None, None), (url, "rest", None), (url, None, "binary")):
            target = endpoint(named[0], "m", named[1], [], False, encoding=named[2])
            assert (target.protocol, target.url, target.binary) == ("rest", url, True)
        assert not endpoint(url, "m", None, [], False, encoding="json").binary


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"protocol": "http"}, "--protocol 'http' is not known"),
        ({"encoding": "jsn"}, "--encoding 'jsn' is not known"),
        ({"encoding": "json", "protocol": "grpc"}, "--encoding json is of rest, not grpc"),
        ({"encoding": "packed", "url": "http://host:1"}, "--encoding packed is of grpc, not rest"),
        ({"protocol": "grpc", "url": "https://host:1"}, "https:// is of rest, not grpc"),
        ({"url": "ftp://host:1"}, "is no address of a server"),
        ({"headers": ["seldon-model: m"]}, "--header 'seldon-model' is not name=value"),
        ({"headers": ["Authorization secret"]}, "--header 'Authorization' is not name=value"),
    ],
)
def test_what_does_not_go_together(given: dict[str, Any], said: str) -> None:
    asked = {"url": "host:1", "protocol": None, "headers": [], "encoding": None, **given}
    with pytest.raises(InputError, match=said):
        endpoint(asked["url"], "m", asked["protocol"], asked["headers"], False, encoding=asked["encoding"])


def test_a_password_in_an_address_is_refused_and_not_shown() -> None:
    with pytest.raises(InputError) as caught:
        endpoint("http://me:secret@host:1", "m", None, [], False)
    assert "secret" not in f"{caught.value.message}{caught.value.hint}"


def test_who_does_not_speak_v2_is_told() -> None:
    with FakeV2Server() as server, pytest.raises(UnreachableError, match="no V2 endpoint answers"):
        endpoint(f"http://{server.target('grpc').url}", "m", None, [], False)


@pytest.mark.parametrize("amount", [0, -1.0, float("inf"), float("nan")])
def test_amounts_are_above_0(amount: float) -> None:
    check_amounts(rate=None, runs=1)
    with pytest.raises(InputError, match="--duration-s is above 0"):
        check_amounts(duration_s=amount)


@pytest.mark.parametrize(
    "amounts", [{"rate": 2e6}, {"concurrency": 200_000}, {"runs": 1001}, {"workers": 65}, {"duration_s": 1e5}]
)
def test_amounts_beyond_any_client_are_refused(amounts: dict[str, float]) -> None:
    check_amounts(for_rate=2e6)
    with pytest.raises(InputError, match="is beyond any client"):
        check_amounts(**amounts)


def test_a_seed_is_no_less_than_0() -> None:
    check_seed(0)
    with pytest.raises(InputError, match="--seed is 0 or more, not -1"):
        check_seed(-1)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    make_folder(tmp_path / "a" / "b", "--out")
    with pytest.raises(InputError, match="--out"):
        make_folder(tmp_path / "file" / "b", "--out")
