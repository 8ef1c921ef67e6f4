"""Leases and records in a store that knows If-None-Match: a double of S3."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from registry.filesystems import destination_of
from registry.remote_folder import RemoteFolder
from registry.shared_store import SharedStore
from registry.store import FolderStore
from tests.doubles.rclone import lead_to
from tests.doubles.s3_conditions import ConditionalS3
from tests.doubles.shared_work import SPEC, wanted_by_three

pytestmark = pytest.mark.slow


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[ConditionalS3]:
    with ConditionalS3() as running:
        lead_to(running.url, monkeypatch)
        yield running


@pytest.fixture
def machine(double: ConditionalS3, tmp_path: Path) -> Callable[[str], SharedStore]:
    def store(name: str, ttl_s: float = 60.0) -> SharedStore:
        return SharedStore("s3://models/x", FolderStore(tmp_path / name), lease_ttl_s=ttl_s)

    return store


def test_what_is_there_is_not_written_over(double: ConditionalS3):
    folder = RemoteFolder(destination_of("s3://models/x"))
    assert folder.is_exclusive("probe")
    assert folder.create("a", b"one")
    assert not folder.create("a", b"two")
    assert folder.read("a") == b"one"
    assert list(double.objects) == ["x/a"]


def test_a_call_whose_answer_was_lost_has_written(double: ConditionalS3):
    folder = RemoteFolder(destination_of("s3://models/x"))
    double.lost = 1
    assert folder.create("a", b"one")  # made again, and refused by what it wrote itself
    assert double.objects == {"x/a": b"one"}


def test_work_that_three_want_is_done_once_and_no_lease_is_left(double: ConditionalS3, machine):
    leases: set[str] = set()

    def look() -> None:
        leases.update(key for key in double.objects if key.startswith("x/leases/"))

    made, results = wanted_by_three(machine, ttl_s=3.0, takes_s=0.3, while_making=look)
    assert len(made) == 1
    assert results == made * 3
    assert "x/leases/k/000001" in leases
    assert list(double.objects) == ["x/records/k.json"]


def test_the_lease_of_a_machine_that_is_gone_is_taken(double: ConditionalS3, machine):
    double.objects["x/leases/k/000001"] = json.dumps({"machine": "elsewhere", "pid": 1, "started": 0.0}).encode()
    assert machine("a", ttl_s=0.4).once("k", lambda: SPEC) == SPEC
    assert list(double.objects) == ["x/records/k.json"]


def test_a_late_result_does_not_replace_the_first(machine):
    assert machine("a").keep("k", SPEC) == SPEC
    assert machine("b").keep("k", replace(SPEC, name="late")) == SPEC
