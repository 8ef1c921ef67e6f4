"""The embedded store after a kill in the middle of its making."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from registry.tracking import open_tracker
from tests.doubles.busy import undisturbed, until

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
    numbers = itertools.count()

    def killed() -> Path:
        folder = tmp_path / f"{next(numbers)}"
        folder.mkdir()
        with subprocess.Popen([sys.executable, "-c", CHECK, str(folder)], stderr=subprocess.DEVNULL) as process:
            # As soon as there is something of a database, the tables are being laid out.
            until(lambda: process.poll() is not None or [*folder.glob("*mlflow.db*")])
            process.kill()
        return folder

    folder = undisturbed(killed, lambda folder: not (folder / "mlflow.db").exists())
    assert [*folder.glob("*mlflow.db*")]
    assert not (folder / "mlflow.db").exists(), "killed too late to tell anything"
    open_tracker(None, folder).check()
    assert (folder / "mlflow.db").exists()
