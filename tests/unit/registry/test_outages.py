"""Which errors of a store's libraries are an outage, and how long a call is made again."""

import errno
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("s3fs")

from aiohttp import ClientPayloadError, InvalidURL, ServerDisconnectedError
from botocore import exceptions as s3
from botocore.parsers import ResponseParserError
from fsspec.exceptions import FSTimeoutError
from s3fs.errors import translate_boto_error

from registry import outages
from registry.filesystems import Scheme, destination_of
from registry.outages import is_outage, patiently
from registry.remote_folder import RemoteFolder
from registry.stopping import pause, stopped_by

URL = {"endpoint_url": "http://store"}


def answered(status: int, code: str) -> BaseException:
    """What s3fs makes of an answer."""
    told = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(s3.ClientError(told, "PutObject"))


def wrapped(error: Exception) -> BaseException:
    """What botocore makes of an error of aiohttp that it has no word for."""
    try:
        try:
            raise error
        except Exception as cause:
            raise s3.HTTPClientError(error=cause)  # noqa: B904 (as it does)
    except s3.HTTPClientError as made:
        return made


@pytest.mark.parametrize(
    ("error", "outage"),
    [
        (answered(500, "InternalError"), True),
        (answered(503, "SlowDown"), True),
        (answered(503, "503"), True),
        (answered(429, "TooManyRequests"), True),
        (answered(400, "RequestTimeout"), True),
        (answered(200, "InternalError"), True),  # as a multipart upload is answered
        (answered(403, "AccessDenied"), False),
        (answered(403, "SignatureDoesNotMatch"), False),
        (answered(404, "NoSuchBucket"), False),
        (answered(404, "NoSuchKey"), False),
        (answered(412, "PreconditionFailed"), False),
        (answered(501, "NotImplemented"), False),
        (s3.EndpointConnectionError(error="refused", **URL), True),
        (s3.ConnectTimeoutError(error="late", **URL), True),
        (s3.ReadTimeoutError(error="late", **URL), True),
        (s3.ConnectionClosedError(error="closed", **URL), True),
        (s3.SSLError(error="not trusted", **URL), False),
        (s3.NoCredentialsError(), False),
        (s3.ParamValidationError(report="wrong"), False),
        (wrapped(ServerDisconnectedError()), True),
        (wrapped(InvalidURL("http://")), False),
        (ClientPayloadError("half"), True),
        (ResponseParserError("<html>"), True),
        (FSTimeoutError(), True),
        (ConnectionResetError(), True),
        (FileNotFoundError("models/x"), False),
        (ValueError("a bug"), False),
    ],
)
def test_what_an_outage_of_s3_is(error: BaseException, outage: bool) -> None:
    assert is_outage("s3", error) is outage


@pytest.mark.parametrize(
    ("number", "outage"),
    [
        (errno.ESTALE, True),
        (errno.EIO, True),
        (errno.ENOTCONN, True),
        (errno.ENOSPC, False),
        (errno.EACCES, False),
        (errno.ENOENT, False),
        (errno.EROFS, False),
    ],
)
def test_what_an_outage_of_a_mounted_folder_is(number: int, outage: bool) -> None:
    assert is_outage("file", OSError(number, os.strerror(number), "/mnt/models")) is outage


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged here; libraries that other tests have used may say something at any time."""
    return [record.getMessage() for record in caplog.records if record.name == outages.__name__]


def called(errors: list[BaseException], **options: Any) -> list[BaseException]:
    """The errors that are left after a call that raises one each time."""
    scheme: Scheme = "file"

    def call() -> None:
        if errors:
            raise errors.pop(0)

    patiently(call, scheme=scheme, uri="/mnt/models", **options)
    return errors


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it was waited, by a clock that goes on by nothing else."""
    pauses: list[float] = []
    monkeypatch.setattr(outages, "time", SimpleNamespace(monotonic=lambda: sum(pauses)))
    monkeypatch.setattr(outages, "pause", pauses.append)
    return pauses


def test_a_call_is_made_again_until_it_succeeds(slept: list[float], caplog: pytest.LogCaptureFixture) -> None:
    stale = [OSError(errno.ESTALE, "stale") for _ in range(4)]
    assert called(list(stale), patience_s=60.0) == []
    assert [text.partition(" (")[0] for text in said(caplog)] == [
        "/mnt/models does not answer",
        f"/mnt/models answers again, after {sum(slept):.0f} s",
    ]
    assert len(slept) == 4
    assert called([], patience_s=0.0) == []
    assert len(said(caplog)) == 2
    with pytest.raises(OSError, match="stale"):
        called(list(stale), patience_s=0.0)
    with pytest.raises(PermissionError):
        called([stale[0], PermissionError(errno.EACCES, "no")], patience_s=60.0)


def test_pauses_grow_and_end_with_the_patience(slept: list[float]) -> None:
    with pytest.raises(OSError, match="stale"):
        called([OSError(errno.ESTALE, "stale") for _ in range(1000)], patience_s=outages.PATIENCE_S)
    assert sum(slept) == pytest.approx(120)
    assert slept[0] <= 0.5
    assert 5 <= max(slept) <= 10
    assert 12 < len(slept) < 40


def test_a_thread_that_nobody_waits_for_stops_waiting_for_its_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RemoteFolder(destination_of(str(tmp_path)))
    folder.write("file", b"1")
    stop = threading.Event()
    with stopped_by(stop):
        pause(0)
        assert b"".join(folder.chunks("file")) == b"1"
        stop.set()
        with pytest.raises(InterruptedError):
            next(folder.chunks("file"))

        def away(path: str) -> bytes:
            raise OSError(errno.ESTALE, "stale")

        monkeypatch.setattr(folder._system, "cat_file", away)
        with pytest.raises(InterruptedError):
            folder.read("file")
    pause(0)
