"""Who sends a campaign to MLflow: one at a time from a folder, and what of others is left alone."""

import threading
import time
from pathlib import Path

import pytest

from registry import mlflow_sending
from registry.errors import StorageError
from registry.mlflow_sending import (
    GONE_AFTER_S,
    SENDER,
    SENT_AT,
    is_anothers,
    may_be_sending,
    one_at_a_time,
    sender_of,
    sender_tags,
)
from tests.doubles.busy import LONG_S, until


def test_what_another_folder_has_just_begun_may_go_on(tmp_path: Path):
    ours, theirs = sender_of(tmp_path / "a"), sender_tags(tmp_path / "b")
    assert may_be_sending(theirs, ours)
    assert is_anothers(theirs, ours)
    assert not may_be_sending({**theirs, SENT_AT: f"{time.time() - GONE_AFTER_S - 1:.0f}"}, ours)
    assert not may_be_sending({SENDER: "somebody", SENT_AT: "soon"}, ours)
    # Our own is left of a try before: nobody else sends from this folder. So is what has no such tag.
    for old in (sender_tags(tmp_path / "a"), {}):
        assert not may_be_sending(old, ours)
        assert not is_anothers(old, ours)


def test_the_same_folder_is_the_same_sender_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert sender_of(Path("work")) == sender_of(tmp_path / "x" / ".." / "work")
    assert sender_of(Path("work")) != sender_of(Path("other"))


def test_the_second_of_a_folder_waits_for_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    begun, order = threading.Event(), []

    def second() -> None:
        begun.set()
        with one_at_a_time(tmp_path):
            order.append("second")

    thread = threading.Thread(target=second)
    with one_at_a_time(tmp_path):
        thread.start()
        assert begun.wait(LONG_S)
        until(lambda: "waiting for it to end" in caplog.text)
        order.append("first")
    thread.join(LONG_S)
    assert order == ["first", "second"]
    assert "another burnish is sending the results of" in caplog.text
    # And another folder's need not wait.
    with one_at_a_time(tmp_path), one_at_a_time(tmp_path / "other"):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "work").write_text("a file")
    with pytest.raises(StorageError, match=r"tracking\.lock could not be written"), one_at_a_time(tmp_path / "work"):
        pass
    assert mlflow_sending.GONE_AFTER_S > 60
