"""What holds for every test."""

import fcntl
import logging
import os
import re
import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes is the machine's affair, and machines are shared.
settings.register_profile("burnish", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("burnish")

# Where one tracking server serves a whole session, and the fixtures that lead to it.
REGISTRY = Path(__file__).parent / "integration" / "registry"
ONE_SERVER = r"\b(mlflow_server|uri): str"
REQUIRE_ALL = os.environ.get("BURNISH_REQUIRE_ALL") == "1"

# A shell starts background jobs with SIGINT ignored, and children inherit that; tests of Ctrl-C need the usual.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Nothing here talks to the outside; what a library would send home stays home.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Campaigns of this run wait for each other's cores, as users' do, but not for those of another run of the tests. The
# workers of a run find what the process that started them has set.
_LOCKS = Path(tempfile.gettempdir(), f"burnish-cores-of-tests-{os.getuid()}-{os.getpid()}")
os.environ.setdefault("BURNISH_CORES", str(_LOCKS))


def pytest_unconfigure() -> None:
    """Removes the locks; a process that was given those of another has none."""
    shutil.rmtree(_LOCKS, ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests that share what takes long to set up run in one worker, which sets it up once; the others in any.

    pytest-xdist 3.8 marks groups in names that pytest 9.2 no longer takes from where they are marked.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByGroups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(config.rootpath / nodeid.partition("::")[0]) or nodeid

    return ByGroups(config, log) if config.getvalue("dist") == "loadgroup" else None


@cache
def _group(module: Path) -> str | None:
    text = module.read_text(encoding="utf-8")
    if named := re.search(r'xdist_group\("(\w+)"\)', text):
        return named[1]
    if module.parent == REGISTRY and re.search(ONE_SERVER, text):
        return "mlflow"
    return str(module) if '@pytest.fixture(scope="module"' in text else None


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


@pytest.fixture(scope="session", autouse=True)
def nothing_told_of_conversions() -> Iterator[None]:
    """OpenVINO reports each conversion over the network, from a fork of this process that has all of its sockets.

    By these words it knows that it is not to; other libraries take them for more, so that they come after imports.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CI", "true")
        patched.setenv("NNCF_CI", "1")
        yield


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
