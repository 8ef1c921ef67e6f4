import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from registry import ledger as journal
from registry.errors import InputError, StorageError
from registry.ledger import Ledger
from registry.records import Failure

ROOT = Path(__file__).parents[3]


def failure(number: int) -> Failure:
    return Failure(subject=f"v{number}", phase="make", kind="error", reason="it broke\nön two lines\u2028", detail="")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "campaign" / "journal.jsonl"


def fill(path, count=3):
    with Ledger.open(path) as ledger:
        for number in range(count):
            ledger.commit("make", f"v{number}", {"seed": number, "tools": {"onnx": "1.0"}}, failure(number))


def test_what_is_committed_is_found_again(path):
    fill(path)
    with Ledger.open(path) as ledger:
        assert ledger.find("make", {"tools": {"onnx": "1.0"}, "seed": 1}) == failure(1)
        assert ledger.find("make", {"seed": 1}) is None
        assert ledger.find("measure", {"seed": 1, "tools": {"onnx": "1.0"}}) is None
        assert [entry.subject for entry in ledger.entries("make")] == ["v0", "v1", "v2"]
        assert ledger.entries("measure") == ()


def test_a_line_holds_what_a_person_may_read(path):
    fill(path, 1)
    line = json.loads(path.read_text())
    assert line["kind"] == "make"
    assert line["subject"] == "v0"
    assert len(line["key"]) == 16
    assert line["components"] == {"seed": 0, "tools": {"onnx": "1.0"}}
    assert line["record"]["type"] == "Failure"


def test_the_subject_is_no_part_of_the_key(path):
    with Ledger.open(path) as ledger:
        ledger.commit("make", "a", {"x": 1}, failure(1))
        assert ledger.find("make", {"x": 1}) == failure(1)
        with pytest.raises(ValueError, match="committed already"):
            ledger.commit("make", "b", {"x": 1}, failure(2))


def test_a_commit_gives_what_will_be_read_back(path):
    with Ledger.open(path) as ledger:
        committed = ledger.commit("make", "a", {"x": (1, 2)}, failure(1))
        assert committed == ledger.find("make", {"x": [1, 2]}) == failure(1)
    with Ledger.open(path) as ledger:
        assert ledger.find("make", {"x": (1, 2)}) == committed


def test_what_json_cannot_say_is_refused_and_leaves_nothing(path):
    with Ledger.open(path) as ledger:
        with pytest.raises(ValueError, match="JSON compliant"):
            ledger.commit("make", "a", {"x": float("nan")}, failure(1))
        assert path.read_bytes() == b""


def test_why_names_what_differs(path):
    with Ledger.open(path) as ledger:
        ledger.commit("make", "int8", {"seed": 1, "tools": {"onnx": "1.0", "torch": "2"}, "old": True}, failure(1))
        why = ledger.why("make", "int8", {"seed": 2, "tools": {"onnx": "1.1", "torch": "2"}, "samples": [1, 2]})
        assert why == (
            "int8 is done again: old was true and is gone; samples is new ([1,2]); seed was 1, is now 2; "
            "tools.onnx was 1.0, is now 1.1."
        )
        assert ledger.why("make", "other", {"seed": 2}) is None
        assert ledger.why("measure", "int8", {"seed": 2}) is None
        assert ledger.why("make", "int8", {"seed": 1, "tools": {"onnx": "1.0", "torch": "2"}, "old": True}) is None


def test_why_looks_at_the_newest_entry_and_cuts_long_values(path):
    with Ledger.open(path) as ledger:
        ledger.commit("make", "int8", {"seed": 1}, failure(1))
        ledger.commit("make", "int8", {"seed": 2}, failure(1))
        assert ledger.why("make", "int8", {"seed": 3}) == "int8 is done again: seed was 2, is now 3."
        long = ledger.why("make", "int8", {"seed": "x" * 500})
        assert len(long) < 120


def test_a_last_line_cut_at_any_byte_is_dropped_and_no_other(path, caplog):
    fill(path, 2)
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for length in range(start, len(whole)):
        path.write_bytes(whole[:length])
        caplog.clear()
        with caplog.at_level(logging.WARNING), Ledger.open(path) as ledger:
            assert len(ledger.entries("make")) == 1
            assert path.read_bytes() == whole[:start]
            if length % 20 == 0:
                ledger.commit("make", "v1", {"seed": 1, "tools": {"onnx": "1.0"}}, failure(1))
                assert path.read_bytes() == whole
        # Libraries that other tests have used may say something at any time.
        assert any(record.name == journal.__name__ for record in caplog.records) == (length > start)


@pytest.mark.parametrize("end", [b"\x00\x00\x00\x00", b"\x00\x00\n", b'{"kind": "ma\n', b"\xff\xfe\n"])
def test_rubbish_at_the_very_end_is_dropped(path, end):
    fill(path)
    whole = path.read_bytes()
    path.write_bytes(whole + end)
    with Ledger.open(path) as ledger:
        assert len(ledger.entries("make")) == 3
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[:-9],
        lambda line: b"",
        lambda line: b"[]",
        lambda line: line.replace(b'"seed":1', b'"seed":7'),
        lambda line: line.replace(b'"phase":"make"', b'"phase":"nowhere"'),
        lambda line: line.replace(b'"schema":1', b'"schema":2'),
        lambda line: line.replace(b'"subject":"v1"}', b"}"),
    ],
)
def test_damage_elsewhere_names_the_line_and_changes_nothing(path, damage):
    fill(path)
    lines = path.read_bytes().split(b"\n")
    damaged = damage(lines[1])
    assert damaged != lines[1]
    content = b"\n".join([lines[0], damaged, *lines[2:]])
    path.write_bytes(content)
    with (
        pytest.raises(InputError, match=r"journal\.jsonl:2: this line of the journal cannot be used"),
        Ledger.open(path),
    ):
        pass
    assert path.read_bytes() == content


def test_a_newer_schema_on_the_last_line_is_not_cut_off(path):
    fill(path)
    content = path.read_bytes().replace(b'"schema":1', b'"schema":2')
    path.write_bytes(content)
    with pytest.raises(InputError, match="schema 2"), Ledger.open(path):
        pass
    assert path.read_bytes() == content


def test_an_entry_that_stands_twice_counts_once(path, caplog):
    fill(path, 1)
    path.write_bytes(path.read_bytes() * 2)
    with Ledger.open(path) as ledger:
        assert len(ledger.entries("make")) == 1
    assert "twice" in caplog.text


def test_a_second_writer_is_told_who_is_there(path):
    with Ledger.open(path) as ledger:
        with (
            pytest.raises(InputError, match=rf"another burnish is working in .*campaign \(pid {os.getpid()}\)"),
            Ledger.open(path),
        ):
            pass
        ledger.commit("make", "a", {"x": 1}, failure(1))
    with Ledger.open(path) as ledger:
        assert ledger.find("make", {"x": 1}) == failure(1)


def test_the_lock_of_a_killed_writer_is_free_and_its_commits_are_there(path):
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from registry.ledger import Ledger
        from registry.records import Failure
        with Ledger.open(Path(sys.argv[1])) as ledger:
            for number in range(10**6):
                record = Failure(subject="a", phase="make", kind="error", reason="r")
                ledger.commit("make", "a", {"n": number}, record)
                print(number, flush=True)
        """
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        told = [int(child.stdout.readline()) for _ in range(5)]
        with pytest.raises(InputError, match=rf"pid {child.pid}"), Ledger.open(path):
            pass
        child.send_signal(signal.SIGKILL)
        told += [int(line) for line in child.stdout.read().split("\n")[:-1]]
    with Ledger.open(path) as ledger:
        assert all(ledger.find("make", {"n": number}) is not None for number in told)
        assert len(ledger.entries("make")) <= len(told) + 1


def test_a_full_disk_leaves_the_journal_as_it_was(path, monkeypatch):
    fill(path, 1)
    before = path.read_bytes()
    real_write = os.write
    with Ledger.open(path) as ledger:
        monkeypatch.setattr(os, "write", lambda fd, content: real_write(fd, content[:10]))
        with pytest.raises(StorageError, match="No space left"):
            ledger.commit("make", "a", {"x": 1}, failure(1))
        assert path.read_bytes() == before
        monkeypatch.undo()
        ledger.commit("make", "a", {"x": 1}, failure(1))
    with Ledger.open(path) as ledger:
        assert len(ledger.entries("make")) == 2


def test_a_line_that_ctrl_c_cuts_short_is_not_there_so_that_the_next_counts(path, monkeypatch):
    fill(path, 1)
    real_fsync = os.fsync

    def interrupted(descriptor: int) -> None:
        real_fsync(descriptor)
        raise KeyboardInterrupt

    with Ledger.open(path) as ledger:
        monkeypatch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ledger.commit("make", "done", {"x": 1}, failure(1))
        monkeypatch.undo()
        ledger.commit("make", "given up", {"x": 1}, failure(2))
    assert [entry.subject for entry in Ledger.read(path).entries()] == ["v0", "given up"]


def test_a_journal_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written"), Ledger.open(tmp_path / "file" / "j.jsonl"):
        pass


def test_a_journal_may_be_read_while_another_writes(path):
    with Ledger.open(path) as ledger:
        ledger.commit("make", "v0", {"seed": 0}, failure(0))
        seen = Ledger.read(path)
        assert seen.find("make", {"seed": 0}) == failure(0)
        assert seen.differences("make", "v0", {"seed": 1}) == ["seed was 0, is now 1"]
        assert seen.differences("make", "v9", {"seed": 1}) == []
        with pytest.raises(ValueError, match="for questions only"):
            seen.commit("make", "v1", {"seed": 1}, failure(1))


def test_reading_a_journal_that_is_not_there_makes_none(path):
    with pytest.raises(InputError, match="no journal"):
        Ledger.read(path)
    assert not path.parent.exists()
