"""A real S3 server on loopback, rclone's, for the folders of a test."""

import os
import re
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RCLONE = Path(sysconfig.get_path("scripts"), "rclone")
KEY, SECRET = "burnish-test", "hunter2-of-the-test"
FOREIGN = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")
"""Variables of the developer's that would lead elsewhere."""


@contextmanager
def serve_s3(buckets: Path, config: Path) -> Iterator[str]:
    """The URL of a server whose buckets are the folders in ``buckets``.

    Args:
        buckets: the folder of buckets.
        config: an empty folder for the server's configuration and log.
    """
    (config / "rclone.conf").touch()
    environment = {**os.environ, "RCLONE_AUTH_KEY": f'"{KEY},{SECRET}"', "RCLONE_CONFIG": str(config / "rclone.conf")}
    command = [str(RCLONE), "serve", "s3", "--addr", "127.0.0.1:0", str(buckets)]
    log = config / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, env=environment, stderr=stderr)
    try:
        yield _listening(process, log)
    finally:
        process.terminate()
        process.wait(timeout=10)


def settings(url: str) -> dict[str, str]:
    """What has to be in the environment to reach a server."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _listening(process: "subprocess.Popen[bytes]", log: Path) -> str:
    while process.poll() is None:
        if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
            return found[0]
        time.sleep(0.02)
    raise AssertionError(log.read_text())
