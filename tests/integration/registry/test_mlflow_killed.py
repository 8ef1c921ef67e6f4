"""The embedded store after a kill in the middle of its making."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from registry.tracking import open_tracker

pytestmark = [
    pytest.mark.slow,
    # MLflow's own queries use an option of SQLAlchemy that is on its way out.
    pytest.mark.filterwarnings("ignore:.*noload.*:DeprecationWarning"),
]

CHECK = """
import sys
from pathlib import Path
from registry.tracking import open_tracker
open_tracker(None, Path(sys.argv[1])).check()
"""


def test_a_store_whose_making_was_killed_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with subprocess.Popen([sys.executable, "-c", CHECK, str(tmp_path)], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        # As soon as there is something of a database, the tables are being laid out.
        while process.poll() is None and not [*tmp_path.glob("*mlflow.db*")] and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        process.kill()
    assert not (tmp_path / "mlflow.db").exists(), "killed too late to tell anything"
    open_tracker(None, tmp_path).check()
    assert (tmp_path / "mlflow.db").exists()
