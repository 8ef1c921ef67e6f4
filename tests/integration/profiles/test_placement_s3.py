"""Folders placed in a real S3 server, rclone's, and fetched by a real rclone as a Core 2 agent does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import psutil
import pytest

from profiles.deploy.placement import Placed, check_destination, place
from registry.errors import InputError, UnreachableError
from tests.doubles.busy import until
from tests.doubles.rclone import KEY, RCLONE, SECRET

NAME = "digits-63f1b5fb"
REMOTES = {"s3": "my-remote"}

pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(s3_prefix: Path) -> Path:
    """What the test has of the bucket."""
    return s3_prefix


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "rendered"
    (made / "1").mkdir(parents=True)
    (made / "config.pbtxt").write_text('name: "digits"\n')
    (made / "1/model.onnx").write_bytes(os.urandom(1_000_000))
    (made / "1/model.onnx.data").write_bytes(b"")
    return made


def place_in(bucket: Path, folder: Path, *, verify: bool = False) -> Placed:
    return place(folder, f"s3://models/{bucket.name}", name=NAME, remotes=REMOTES, verify=verify)


def on_disk(bucket: Path, placed: Placed) -> Path:
    return bucket.parent / placed.uri.removeprefix("s3://models/")


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def stamps(root: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in root.rglob("*") if path.is_file()}


def test_a_folder_is_uploaded_once_and_rclone_fetches_it_byte_for_byte(
    bucket: Path, folder: Path, tmp_path: Path
) -> None:
    placed = place_in(bucket, folder)
    assert placed.uploaded
    assert placed.uri == f"s3://models/{bucket.name}/{NAME}/{placed.digest}"
    assert placed.rclone_uri == f"my-remote://models/{bucket.name}/{NAME}/{placed.digest}"
    before = stamps(bucket)
    assert len(before) == 4  # with the manifest
    for verify in (False, True):
        assert not place_in(bucket, folder, verify=verify).uploaded
    assert stamps(bucket) == before
    for path in bucket.rglob("*.json"):
        assert SECRET not in path.read_text()
        assert KEY not in path.read_text()

    config = tmp_path / "rclone.conf"
    config.write_text(
        "[my-remote]\ntype = s3\nprovider = Rclone\n"
        f"endpoint = {os.environ['AWS_ENDPOINT_URL']}\naccess_key_id = {KEY}\nsecret_access_key = {SECRET}\n"
    )
    command = [str(RCLONE), "--config", str(config), "copy", placed.rclone_uri, str(tmp_path / "fetched")]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    assert files_of(tmp_path / "fetched") == files_of(folder)


def test_a_changed_file_is_found_and_kept(bucket: Path, folder: Path) -> None:
    placed = place_in(bucket, folder)
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    store.pipe_file(f"{placed.uri}/config.pbtxt", b'name: "digitz"\n')
    with pytest.raises(InputError, match=r"'config.pbtxt' has other bytes"):
        place_in(bucket, folder, verify=True)
    store.pipe_file(f"{placed.uri}/config.pbtxt", b"short")
    with pytest.raises(InputError, match=r"'config.pbtxt' has 5 bytes instead of 15"):
        place_in(bucket, folder)
    assert (on_disk(bucket, placed) / "config.pbtxt").read_text() == "short"


CHILD = """
import os, signal, sys, threading
from pathlib import Path
from profiles.deploy.placement import place
from profiles.deploy.storage import Store
put, begun = Store.put, []

def last(store, path, source):
    begun.append(path)
    if len(begun) == 8:
        threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGKILL)).start()
    elif len(begun) > 8:
        threading.Event().wait()  # however late the kill is
    put(store, path, source)

Store.put = last
place(Path(sys.argv[1]), sys.argv[2], name=sys.argv[3], remotes={"s3": "my-remote"})
"""


def connections_of_the_server() -> list[str]:
    """Their states: one whose client has ended waits to be closed for as long as the server works on its request."""
    port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    each = [child.net_connections("tcp") for child in psutil.Process().children() if child.name() == "rclone"]
    states = [one.status for held in each for one in held if one.laddr.port == port]
    assert psutil.CONN_LISTEN in states
    return states


def test_an_upload_that_was_killed_is_completed_and_not_taken_for_whole(bucket: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rendered"
    folder.mkdir()
    for number in range(60):
        (folder / f"part-{number:02}").write_bytes(os.urandom(200_000))
    command = [sys.executable, "-c", CHILD, str(folder), f"s3://models/{bucket.name}", NAME]
    child = subprocess.run(command, cwd=Path(__file__).parents[3], check=False, timeout=200)
    assert child.returncode == -signal.SIGKILL
    until(lambda: psutil.CONN_CLOSE_WAIT not in connections_of_the_server())
    there = stamps(bucket)
    assert 5 < len(there) < 60
    assert not list(bucket.rglob("*.json"))

    placed = place_in(bucket, folder)
    assert placed.uploaded
    assert files_of(on_disk(bucket, placed)) == files_of(folder)
    assert Path(f"{on_disk(bucket, placed)}.json").is_file()
    whole = {path: stamp for path, stamp in there.items() if ".rclone_temp" not in path.name}
    assert {path: stamps(bucket)[path] for path in whole} == whole


@pytest.mark.parametrize(
    ("changed", "kind", "said"),
    [
        ({}, InputError, "s3://no-such-bucket: there is no such bucket"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong-hunter2"}, UnreachableError, "access denied"),
        ({"AWS_ENDPOINT_URL": "http://user:hunter2@127.0.0.1:9"}, UnreachableError, "the store does not answer"),
        ({"AWS_PROFILE": "no-such-profile"}, UnreachableError, "no credentials that could be used"),
    ],
)
def test_what_the_store_refuses_is_said_in_one_line(
    bucket: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, str],
    kind: type[InputError | UnreachableError],
    said: str,
) -> None:
    for variable, value in changed.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(kind, match=said) as raised:
        place(folder, f"s3://{'models' if changed else 'no-such-bucket'}/{bucket.name}", name=NAME, remotes=REMOTES)
    assert "\n" not in raised.value.message
    assert "hunter2" not in str(raised.value)
    assert raised.value.exit_code == (4 if changed else 2)
    assert not files_of(bucket)


# --- before anything is placed --------------------------------------------------------------------------------------


def test_a_destination_that_can_be_used_is_looked_at_and_left_alone(bucket: Path) -> None:
    check_destination(f"s3://models/{bucket.name}")
    assert not bucket.exists()


@pytest.mark.parametrize(
    ("destination", "change", "error", "words"),
    [
        ("s3://nowhere", {}, InputError, "there is no such bucket"),
        ("s3://models", {"AWS_SECRET_ACCESS_KEY": "wrong-one"}, UnreachableError, "access denied"),
        ("s3://models", {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, UnreachableError, "the store does not answer"),
    ],
)
def test_a_destination_that_cannot_be_used_is_told(
    bucket: Path,
    monkeypatch: pytest.MonkeyPatch,
    destination: str,
    change: dict[str, str],
    error: type[Exception],
    words: str,
) -> None:
    for variable, value in change.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(error, match=words) as caught:
        check_destination(destination)
    assert SECRET not in str(caught.value)
    assert "wrong-one" not in str(caught.value)
