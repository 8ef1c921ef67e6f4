"""What holds for every test."""

import fcntl
import logging
import os
import signal
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# How long an example takes is the machine's affair, and machines are shared.
settings.register_profile("burnish", deadline=None)
settings.load_profile("burnish")

HERE = Path(__file__).parent
WITH_SERVERS = ("e2e", "integration/profiles", "integration/registry")
REQUIRE_ALL = os.environ.get("BURNISH_REQUIRE_ALL") == "1"

# A shell starts background jobs with SIGINT ignored, and children inherit that; tests of Ctrl-C need the usual.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Nothing here talks to the outside; what a library would send home stays home.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Campaigns of tests that run beside each other do not wait for each other's cores.
_LOCKS = f"burnish-cores-of-tests-{os.getuid()}-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
os.environ.setdefault("BURNISH_CORES", str(Path(tempfile.gettempdir(), _LOCKS)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with servers take their turns in one worker; the others run beside them in the next."""
    for item in items:
        if any(item.path.is_relative_to(HERE / folder) for folder in WITH_SERVERS):
            item.add_marker(pytest.mark.xdist_group("servers"))


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedded tracking store with nothing in it, to be copied; MLflow takes seconds to lay out its tables.

    It is made once for all workers.
    """
    from registry.tracking import open_tracker

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "empty-store"
    folder.mkdir(exist_ok=True)
    with (
        (folder / "lock").open("w") as lock,
        pytest.MonkeyPatch.context() as patched,
        warnings.catch_warnings(),
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Of MLflow's own libraries.
        warnings.simplefilter("ignore")
        patched.delenv("MLFLOW_TRACKING_URI", raising=False)
        if not (folder / "mlflow.db").exists():
            open_tracker(None, folder).check()
    return folder / "mlflow.db"


@pytest.fixture(autouse=True)
def usual_log_level(caplog: pytest.LogCaptureFixture) -> None:
    """Warnings are logged and captured, whatever libraries that other tests call have set for the whole process."""
    caplog.set_level(logging.WARNING)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    """Under BURNISH_REQUIRE_ALL=1 a skipped test fails: CI has every part, so a skip hides one."""
    report = yield
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, which BURNISH_REQUIRE_ALL=1 forbids: {report.longrepr[2]}"
    return report
