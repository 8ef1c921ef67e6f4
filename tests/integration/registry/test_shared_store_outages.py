"""A store that is away for a while, for all or for one: a double of S3 that does not answer, or is overloaded."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from botocore import retryhandler

from registry import outages, remote_folder
from registry.errors import BurnishError, InputError, StorageError
from registry.filesystems import destination_of
from registry.records import TensorSpec
from registry.remote_folder import RemoteFolder
from registry.shared_store import SharedStore
from registry.store import FolderStore
from tests.doubles.busy import until
from tests.doubles.rclone import lead_to
from tests.doubles.s3_conditions import ConditionalS3
from tests.doubles.shared_work import SPEC

pytestmark = pytest.mark.slow

GONE = (0, "")


def away(key: str) -> tuple[int, str]:
    """The rule of a store that answers nobody."""
    return GONE


def nothing(key: str) -> None:
    """The rule of a store that is there."""


MACHINE = "AWS_ACCESS_KEY_ID"
WARNED = ("registry.outages", logging.WARNING)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[ConditionalS3]:
    monkeypatch.setattr(outages, "_FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(outages, "_LONGEST_PAUSE_S", 0.1)
    # Nor is there time between botocore's own two attempts.
    monkeypatch.setattr(retryhandler, "random", SimpleNamespace(random=lambda: 0.0))
    with ConditionalS3() as running:
        lead_to(running.url, monkeypatch)
        yield running


@pytest.fixture
def machine(
    double: ConditionalS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, float], SharedStore]:
    """Each machine has an access key of its own, by which it can be cut off."""

    def store(name: str, ttl_s: float) -> SharedStore:
        monkeypatch.setenv(MACHINE, f"{name}-key")
        made = SharedStore("s3://models/x", FolderStore(tmp_path / name), lease_ttl_s=ttl_s)
        made.check()  # which is when credentials are looked for
        return made

    return store


@pytest.fixture
def pauses(double: ConditionalS3, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses between calls, which take no time; the store comes back in one that is longer than 10 ms."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if seconds > 0.01:
            double.instead = nothing

    monkeypatch.setattr(outages, "time", SimpleNamespace(monotonic=lambda: sum(slept)))
    monkeypatch.setattr(outages, "pause", sleep)
    return slept


CALLS: dict[str, Callable[[RemoteFolder, Path], object]] = {
    "read": lambda folder, file: folder.read("there"),
    "write": lambda folder, file: folder.write("a", b"content"),
    "create": lambda folder, file: folder.create("a", b"content"),
    "put": lambda folder, file: folder.put("a", file),
    "chunks": lambda folder, file: list(folder.chunks("there")),
    "names": lambda folder, file: folder.names("sub"),
    "remove": lambda folder, file: folder.remove("there"),
}


def test_calls_to_a_store_that_is_away_are_made_again(
    double: ConditionalS3, pauses: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"content")
    folder = RemoteFolder(destination_of("s3://models/x"))
    for name, call in CALLS.items():
        found = []
        for rule in (nothing, away):
            double.objects.clear()
            double.objects |= {"x/there": b"1234", "x/sub/one": b""}
            double.instead = rule
            found.append((call(folder, tmp_path / "file"), dict(double.objects)))
        assert found[0] == found[1], name
        assert len(pauses) == 1, name
        pauses.clear()
        told = [message for logger, level, message in caplog.record_tuples if (logger, level) == WARNED]
        caplog.clear()
        assert len(told) == 2, name
        assert told[0].startswith("s3://models/x does not answer (")
        assert told[0].endswith("; it is asked again for up to 120 s")
        assert told[1].startswith("s3://models/x answers again, after ")


def test_an_overloaded_store_is_asked_again(double: ConditionalS3, pauses: list[float]) -> None:
    folder = RemoteFolder(destination_of("s3://models/x"))
    folder.write("a", b"one")
    double.instead = lambda key: (503, "SlowDown")
    assert folder.read("a") == b"one"
    assert len(pauses) == 1


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ((403, "AccessDenied"), StorageError, "access denied"),
        ((404, "NoSuchBucket"), InputError, "there is no such bucket"),
        ((400, "InvalidRequest"), StorageError, "InvalidRequest"),
        ((501, "NotImplemented"), StorageError, "NotImplemented"),
    ],
)
def test_a_refusal_is_said_at_once(
    double: ConditionalS3, answer: tuple[int, str], error: type[BurnishError], words: str
) -> None:
    folder = RemoteFolder(destination_of("s3://models/x"))
    double.instead = lambda key: answer
    with pytest.raises(error, match=words):
        folder.write("a", b"one")
    assert double.asked == 1


def test_what_lasts_too_long_is_said(double: ConditionalS3, pauses: list[float]) -> None:
    double.instead = away
    with pytest.raises(StorageError, match="s3://models/x: the store does not answer"):
        RemoteFolder(destination_of("s3://models/x"), patience_s=0.01).write("a", b"one")
    assert sum(pauses) == 0.01
    with pytest.raises(StorageError, match="does not answer"):
        RemoteFolder(destination_of("s3://models/x")).at_once().write("a", b"one")
    assert sum(pauses) == 0.01


def test_before_work_begins_an_outage_is_said_soon(double: ConditionalS3, tmp_path: Path) -> None:
    double.instead = lambda key: (503, "SlowDown")
    with pytest.raises(StorageError, match="SlowDown"):
        SharedStore("s3://models/x", FolderStore(tmp_path), patience_s=600.0).check()


def test_a_file_is_fetched_block_by_block(
    double: ConditionalS3, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_folder, "BLOCK_BYTES", 1000)
    content = os.urandom(2005)
    double.objects["x/big"] = content
    found = []
    for chunk in RemoteFolder(destination_of("s3://models/x")).chunks("big"):
        found.append(chunk)
        double.instead = away
    assert b"".join(found) == content
    assert [len(chunk) for chunk in found] == [1000, 1000, 5]
    assert len(pauses) == 2
    double.instead = nothing
    with pytest.raises(InputError, match="s3://models/x/none is not there"):
        list(RemoteFolder(destination_of("s3://models/x")).chunks("none"))


# --- leases --------------------------------------------------------------------------------------------------------


def worked(store: SharedStore, name: str, made: list[str], make: Callable[[], object]) -> TensorSpec:
    def work() -> TensorSpec:
        made.append(name)
        make()
        return replace(SPEC, name=name)

    return store.once("k", work)


def waiting(store: SharedStore, made: list[str], found: list[str]) -> threading.Thread:
    """Another machine, ``b``, that wants the same work."""
    thread = threading.Thread(target=lambda: found.append(worked(store, "b", made, lambda: None).name))
    thread.start()
    return thread


def test_a_lease_outlives_an_outage_for_all(double: ConditionalS3, machine) -> None:
    ttl_s = 0.9
    first, second = machine("a", ttl_s), machine("b", ttl_s)
    made: list[str] = []
    found: list[str] = []
    others: list[threading.Thread] = []

    def make() -> None:
        others.append(waiting(second, made, found))
        time.sleep(ttl_s / 3)
        back = time.monotonic() + 1.2 * ttl_s
        double.instead = lambda key: GONE if time.monotonic() < back else None
        time.sleep(2.5 * ttl_s)

    assert worked(first, "a", made, make).name == "a"
    others[0].join()
    assert (made, found) == (["a"], ["a"])
    assert list(double.objects) == ["x/records/k.json"]


def test_who_was_cut_off_for_longer_knows_that_the_lease_is_anothers(
    double: ConditionalS3, machine, caplog: pytest.LogCaptureFixture
) -> None:
    ttl_s = 0.6
    first, second = machine("a", ttl_s), machine("b", ttl_s)
    made: list[str] = []
    found: list[str] = []
    others: list[threading.Thread] = []
    written: list[str] = []

    def make() -> None:
        double.instead = lambda key: GONE if key == "a-key" else None
        others.append(waiting(second, made, found))
        others[0].join()
        double.instead = nothing
        until(lambda: "is made by another process as well" in caplog.text)
        written.extend(double.objects)

    # The first result that is committed counts, for both.
    assert worked(first, "a", made, make).name == "b"
    assert (made, found) == (["a", "b"], ["b"])
    assert written == list(double.objects) == ["x/records/k.json"]
