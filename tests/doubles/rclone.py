"""A real S3 server on loopback, rclone's, for the folders of a test."""

import os
import re
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import pytest

RCLONE = Path(sysconfig.get_path("scripts"), "rclone")
KEY, SECRET = "burnish-test", "hunter2-of-the-test"
FOREIGN = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")
"""Variables of the developer's that would lead elsewhere."""


class S3Server:
    """A server that can be killed, and started again at its address. A context manager.

    Attributes:
        url: where it listens, once it was started.
    """

    def __init__(self, buckets: Path, config: Path) -> None:
        """Starts nothing.

        Args:
            buckets: a folder whose folders are the buckets.
            config: a folder for the server's configuration and log.
        """
        self.url = ""
        self._buckets = buckets
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=60)

    def start(self) -> None:
        """Returns when it listens."""
        configuration, log = self._config / "rclone.conf", self._config / "rclone.log"
        configuration.touch()
        environment = {**os.environ, "RCLONE_AUTH_KEY": f'"{KEY},{SECRET}"', "RCLONE_CONFIG": str(configuration)}
        address = self.url.removeprefix("http://") or "127.0.0.1:0"
        with log.open("wb") as stderr:
            command = [str(RCLONE), "serve", "s3", "--addr", address, str(self._buckets)]
            self._process = subprocess.Popen(command, env=environment, stderr=stderr)
        self.url = _listening(self._process, log)

    def kill(self) -> None:
        """Ends it with SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=60)


@contextmanager
def serve_s3(buckets: Path, config: Path) -> Iterator[str]:
    """The URL of an `S3Server` for the time of a block."""
    with S3Server(buckets, config) as server:
        yield server.url


def settings(url: str) -> dict[str, str]:
    """What has to be in the environment to reach a server."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def lead_to(url: str, patched: pytest.MonkeyPatch) -> None:
    """Has the environment lead to a server, for the time of a test."""
    for variable in FOREIGN:
        patched.delenv(variable, raising=False)
    for variable, value in settings(url).items():
        patched.setenv(variable, value)


def _listening(process: "subprocess.Popen[bytes]", log: Path) -> str:
    while process.poll() is None:
        if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
            return found[0]
        time.sleep(0.02)
    raise AssertionError(log.read_text())
