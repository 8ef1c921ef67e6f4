import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from profiles.deploy import storage, storage_uris
from profiles.deploy.placement import Placed, place
from profiles.deploy.storage_uris import fetched_as, rclone_uri, resolve
from registry.errors import InputError, MissingExtraError, UnreachableError

NAME = "digits-63f1b5fb"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model for Triton, as it is rendered."""
    made = tmp_path / "rendered"
    (made / "1").mkdir(parents=True)
    (made / "config.pbtxt").write_text('name: "digits"\n')
    (made / "1/model.onnx").write_bytes(bytes(range(256)) * 40)
    (made / "1/model.onnx.data").write_bytes(b"")
    return made


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def stamps(root: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in root.rglob("*")}


# --- a local folder --------------------------------------------------------------------------------------------


def placed_in(folder: Path, tmp_path: Path, **given: Any) -> Placed:
    return place(folder, str(tmp_path / "volume"), name=NAME, **given)


def test_the_folder_stands_under_its_name_and_digest_with_a_manifest_beside_it(folder: Path, tmp_path: Path) -> None:
    placed = placed_in(folder, tmp_path)
    assert placed.uploaded
    assert placed.size_bytes == 10240 + len('name: "digits"\n')
    assert placed.uri == placed.rclone_uri == f"{tmp_path}/volume/{NAME}/{placed.digest}"
    assert files_of(Path(placed.uri)) == files_of(folder)
    manifest = json.loads(Path(f"{placed.uri}.json").read_text())
    assert manifest["digest"] == placed.digest
    assert manifest["files"]["1/model.onnx"]["size_bytes"] == 10240
    assert {path.name for path in Path(placed.uri).parent.iterdir()} == {placed.digest, f"{placed.digest}.json"}


def test_others_can_read_what_is_placed(folder: Path, tmp_path: Path) -> None:
    placed = placed_in(folder, tmp_path)
    assert {path.stat().st_mode & 0o777 for path in Path(placed.uri).rglob("*") if path.is_file()} == {0o644}


@pytest.mark.parametrize("verify", [False, True])
def test_a_second_call_writes_nothing(folder: Path, tmp_path: Path, verify: bool) -> None:
    first = placed_in(folder, tmp_path)
    before = stamps(tmp_path / "volume")
    second = placed_in(folder, tmp_path, verify=verify)
    assert not second.uploaded
    assert (second.uri, second.size_bytes) == (first.uri, first.size_bytes)
    assert stamps(tmp_path / "volume") == before


def test_other_bytes_have_another_place(folder: Path, tmp_path: Path) -> None:
    first = placed_in(folder, tmp_path)
    (folder / "config.pbtxt").write_text('name: "digitz"\n')
    second = placed_in(folder, tmp_path)
    assert second.uploaded
    assert second.digest != first.digest
    assert Path(first.uri, "config.pbtxt").read_text() == 'name: "digits"\n'


def test_the_same_bytes_under_another_path_are_another_folder(folder: Path, tmp_path: Path) -> None:
    first = placed_in(folder, tmp_path)
    (folder / "1").rename(folder / "2")
    assert placed_in(folder, tmp_path).digest != first.digest


def test_what_a_killed_upload_left_is_completed(folder: Path, tmp_path: Path) -> None:
    placed = placed_in(folder, tmp_path)
    Path(f"{placed.uri}.json").unlink()
    Path(placed.uri, "config.pbtxt").unlink()
    kept = Path(placed.uri, "1/model.onnx").stat().st_ino
    again = placed_in(folder, tmp_path)
    assert again.uploaded
    assert files_of(Path(again.uri)) == files_of(folder)
    assert Path(f"{again.uri}.json").is_file()
    assert Path(placed.uri, "1/model.onnx").stat().st_ino == kept


def test_half_files_of_killed_uploads_go_once_they_are_old(folder: Path, tmp_path: Path) -> None:
    placed = placed_in(folder, tmp_path)
    Path(f"{placed.uri}.json").unlink()
    old, new = (Path(placed.uri).with_name(f".{placed.digest}.{word}.part") for word in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    placed_in(folder, tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize(
    ("path", "content", "manifest", "said"),
    [
        ("config.pbtxt", b"name:", True, "'config.pbtxt' has 5 bytes instead of 15"),
        ("config.pbtxt", b'name: "digitz"\n', False, "'config.pbtxt' has other bytes"),
        ("2/model.onnx", b"", True, "'2/model.onnx' is no file of this folder"),
        ("../{digest}.json", b"{}", True, "is not the manifest of this folder"),
        ("../{digest}.json", b"half", True, "is not the manifest of this folder"),
    ],
)
def test_other_bytes_that_are_there_are_never_written_over(
    folder: Path, tmp_path: Path, path: str, content: bytes, manifest: bool, said: str
) -> None:
    placed = placed_in(folder, tmp_path)
    target = Path(placed.uri, path.format(digest=placed.digest))
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(content)
    if not manifest:
        Path(f"{placed.uri}.json").unlink()
    before = stamps(tmp_path / "volume")
    with pytest.raises(InputError, match=said) as raised:
        placed_in(folder, tmp_path)
    assert "Nothing was written over" in str(raised.value)
    assert stamps(tmp_path / "volume") == before


def test_a_change_that_keeps_the_size_is_found_by_verify(folder: Path, tmp_path: Path) -> None:
    placed = placed_in(folder, tmp_path)
    Path(placed.uri, "config.pbtxt").write_text('name: "digitz"\n')
    assert not placed_in(folder, tmp_path).uploaded
    with pytest.raises(InputError, match=r"'config.pbtxt' has other bytes"):
        placed_in(folder, tmp_path, verify=True)


def test_a_write_that_went_wrong_is_found_and_leaves_no_manifest(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(base: Path, target: Path, source: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes().replace(b"d", b"D"))

    monkeypatch.setattr(storage, "put_local", damage)
    with pytest.raises(UnreachableError, match="reads back with other bytes"):
        placed_in(folder, tmp_path)
    assert not list((tmp_path / "volume").rglob("*.json"))


def test_a_full_disk_is_said_and_leaves_nothing_half(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(UnreachableError, match="no space is left there"):
        placed_in(folder, tmp_path)
    assert not files_of(tmp_path / "volume")


def test_a_file_in_the_way_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "volume").write_text("")
    with pytest.raises(UnreachableError, match="Not a directory") as raised:
        placed_in(folder, tmp_path)
    assert raised.value.exit_code == 4


# --- what can be placed ----------------------------------------------------------------------------------------


def test_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "secret").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="is no regular file"):
        placed_in(folder, tmp_path)


def test_a_name_that_cannot_be_shown_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "a\nb").write_text("")
    with pytest.raises(InputError, match="cannot be uploaded"):
        placed_in(folder, tmp_path)


def test_an_empty_folder_a_missing_one_and_a_wrong_name_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty/deeper").mkdir(parents=True)
    for wrong, said in (("empty", "holds no file"), ("missing", "is not a folder")):
        with pytest.raises(InputError, match=said):
            placed_in(tmp_path / wrong, tmp_path)
    with pytest.raises(InputError, match="takes no Model named 'Digits_1'"):
        place(folder, str(tmp_path / "volume"), name="Digits_1")


# --- URIs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "given", "expected"),
    [
        ("gs://models/digits/", {}, "gs://models/digits"),
        ("gs://models", {"remotes": {"gs": "private"}}, "private://models"),
        ("s3://models/a/b", {"remotes": {"s3": "my-remote"}}, "my-remote://models/a/b"),
        ("s3://models/a/b", {"remotes": {"s3": "s3"}}, "s3://models/a/b"),
        ("/srv/models/a", {}, "/srv/models/a"),
        ("/srv/models/a", {"mounts": {"/srv/models": "/mnt/models/"}}, "/mnt/models/a"),
        ("/srv/models", {"mounts": {"/srv/models": "/mnt/models"}}, "/mnt/models"),
        ("file:///srv/models/a", {"mounts": {"/srv": "/mnt"}}, "/mnt/models/a"),
    ],
)
def test_what_rclone_calls_it(uri: str, given: dict[str, Any], expected: str) -> None:
    assert rclone_uri(uri, **given) == expected


def test_an_unknown_remote_is_said_with_what_to_configure() -> None:
    with pytest.raises(InputError) as raised:
        rclone_uri("s3://models/digits")
    assert raised.value.message == "it is not known which rclone remote of the cluster reads s3://"
    shape = str(raised.value.hint).partition("value ")[2].partition(", name the Secret")[0]
    assert json.loads(shape)["type"] == "s3"
    assert json.loads(shape)["parameters"]["secret_access_key"] == "..."


@pytest.mark.parametrize(
    ("uri", "given", "said"),
    [
        ("", {}, "is empty"),
        ("s3://models/my model", {}, "has a space in it"),
        ("s3:///digits//x", {}, "names no bucket and prefix"),
        ("s3://", {}, "names no bucket and prefix"),
        ("s3://models/../x", {}, "names no bucket and prefix"),
        ("https://host/x", {}, "no way to place anything at https:"),
        ("models:/digits/1", {}, "is MLflow's"),
        ("file://x", {}, "is no file of this machine"),
        ("s3://models", {"remotes": {"s3": "a:b"}}, "cannot be the name of an rclone remote"),
        ("/srv/models", {"mounts": {"/data": "/mnt"}}, "has no mount of /srv/models; it has /data"),
        ("/srv/models", {"mounts": {"/srv": "mnt"}}, "'mnt' is no absolute path"),
    ],
)
def test_what_cannot_be_fetched_is_refused(uri: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        rclone_uri(uri, **given)


@pytest.mark.parametrize(
    "uri", ["s3://user:hunter2@models/x", "gs://models/x?X-Goog-Signature=hunter2", "s3://user:hun/ter2@m/x#"]
)
def test_a_uri_with_credentials_is_refused_without_being_shown(folder: Path, uri: str) -> None:
    with pytest.raises(InputError, match="as one with credentials has") as raised:
        place(folder, uri, name=NAME)
    assert "ter2" not in str(raised.value)
    assert "user" not in str(raised.value)


def test_the_two_names_of_one_place() -> None:
    assert fetched_as("s3://models/a/", "mine://models/a") == ({"s3": "mine"}, {})
    assert fetched_as("/srv/models", "/mnt/models/") == ({}, {"/srv/models": "/mnt/models"})
    assert fetched_as("gs://models/a", None) == ({}, {})
    with pytest.raises(InputError, match="is not where s3://models/a is"):
        fetched_as("s3://models/a", "mine://models/b")


# --- Google Cloud Storage, and MLflow --------------------------------------------------------------------------


class Bucket(MemoryFileSystem):
    """fsspec's file system in memory, in the place of gcsfs."""

    store: dict[str, Any] = {}  # noqa: RUF012 - as in the base class
    pseudo_dirs = [""]  # noqa: RUF012
    protocol = "gs"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.removeprefix("gs://")).removeprefix("/")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    made = Bucket()
    monkeypatch.setattr(fsspec, "filesystem", lambda scheme, **_: made)
    yield made
    Bucket.store.clear()


def test_a_gs_destination_is_read_by_core_2s_own_remote(folder: Path, bucket: Bucket) -> None:
    placed = place(folder, "gs://models/team", name=NAME)
    assert placed.uri == placed.rclone_uri == f"gs://models/team/{NAME}/{placed.digest}"
    assert bucket.cat_file(f"models/team/{NAME}/{placed.digest}/1/model.onnx") == (folder / "1/model.onnx").read_bytes()
    assert not place(folder, "gs://models/team", name=NAME, verify=True).uploaded


def test_a_missing_library_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(scheme: str, **_: Any) -> None:
        raise ImportError(f"Please install a library for {scheme}")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(MissingExtraError, match=r"burnish\[gcs\]"):
        place(folder, "gs://models", name=NAME)


@pytest.mark.parametrize(
    ("location", "expected"),
    [("s3://mlflow/1/artifacts/model", "mine://mlflow/1/artifacts/model"), ("/srv/mlruns/1", "/mnt/mlruns/1")],
)
def test_an_artifact_of_mlflow_is_resolved(monkeypatch: pytest.MonkeyPatch, location: str, expected: str) -> None:
    monkeypatch.setattr(storage_uris, "artifact_location", lambda uri, tracking_uri: location)
    assert resolve("models:/digits/1", remotes={"s3": "mine"}, mounts={"/srv": "/mnt"}) == expected


def test_what_only_mlflows_server_can_read_is_said_with_the_command() -> None:
    with pytest.raises(InputError, match="is kept where rclone cannot read it: mlflow-artifacts:") as raised:
        resolve("mlflow-artifacts:/1/abc/artifacts/model")
    assert "mlflow artifacts download --artifact-uri mlflow-artifacts:/1/abc/artifacts/model" in str(raised.value.hint)


def test_mlflow_without_a_tracking_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match="no tracking store is named"):
        resolve("runs:/abc/model")
