"""MLflow's own pages of a campaign in a real browser: what is recorded is where its users look for it."""

import dataclasses
import itertools
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import pytest

from registry.mlflow_tracking import MlflowTracker
from registry.ports import Published
from registry.records import Campaign
from tests.doubles import campaigns, searches
from tests.doubles.busy import undisturbed

pytestmark = [
    pytest.mark.slow,
    # MLflow's own libraries, not our use of them.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--window-size=1600,2400",
    # Time of the page's own, which passes as fast as it has nothing to do.
    "--virtual-time-budget=20000",
)  # fmt: skip


@pytest.fixture(scope="module")
def published(
    mlflow_server: str, campaign: Campaign, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Published]:
    """The pages' common beginning, and what was recorded."""
    made = dataclasses.replace(campaign, model_name="digits-in-the-browser", serving_searches=(searches.search(),))
    done = MlflowTracker(mlflow_server, tmp_path_factory.mktemp("work")).publish(made, files={})
    return done.location.partition("/runs/")[0], done


@pytest.fixture
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    return found


def missing(words: Sequence[str], chromium: str, url: str, picture: Path) -> list[str]:
    """Those words that the page does not show when all is loaded; its picture is kept.

    The page's own time may be over before a server that stands still has answered all; then it is opened once more.
    """
    numbers = itertools.count()

    def not_shown() -> list[str]:
        command = [chromium, *QUIET, f"--user-data-dir={picture.parent / f'profile-{next(numbers)}'}"]
        taken = [f"--screenshot={picture}", "--dump-dom", url]
        done = subprocess.run([*command, *taken], capture_output=True, text=True, timeout=120, check=True)
        return [word for word in words if word not in done.stdout]

    return undisturbed(not_shown, lambda left: not left, tries=3)


def test_the_compare_page_shows_the_candidates_side_by_side(
    chromium: str, published: tuple[str, Published], tmp_path: Path
) -> None:
    base, done = published
    runs = [done.runs[one.id] for one in campaigns.CANDIDATES]
    asked = f"runs={quote(json.dumps(runs))}&experiments={quote(json.dumps([base.rpartition('/')[2]]))}"
    names = [one.name for one in campaigns.CANDIDATES]
    # What has room in MLflow's tables; the rest comes in when one scrolls.
    words = (*names, *runs, "accuracy_drop_high", "calibration_digest", "burnish.verdict")
    url = f"{base.partition('#')[0]}#/compare-runs?{asked}"
    assert missing(words, chromium, url, tmp_path / "compare.png") == []


def test_the_page_of_a_run_shows_its_verdict_samples_and_model(
    chromium: str, published: tuple[str, Published], tmp_path: Path
) -> None:
    base, done = published
    words = (campaigns.campaign().verdict.sentence, "evaluation samples", "int8-static", "digits-in-the-browser")
    url = f"{base}/runs/{done.runs[campaigns.STATIC_TRITON.id]}"
    assert missing(words, chromium, url, tmp_path / "run.png") == []
