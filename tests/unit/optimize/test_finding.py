"""A campaign on this machine has its cores alone, once it has something to do with them."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from optimize.engines.cores import cores_alone, reserve_cores
from optimize.finding import with_cores_alone
from optimize.plan import Workspace
from registry.ledger import Ledger
from registry.records import Failure
from registry.store import FolderStore
from tests.unit.optimize.test_plan import planned

RESULT = Failure(subject="v", phase="make", kind="error", reason="r")


class Told:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def phase(self, name: str, total: int) -> None: ...

    def begun(self, kind: str, subject: str, where: str = "") -> None: ...

    def ended(self, kind: str, subject: str) -> None: ...

    def done(self, subject: str, outcome: str) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_CORES", str(tmp_path / "locks"))


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    made = planned(tmp_path)
    with Ledger.open(made.work / "ledger.jsonl") as ledger:
        yield Workspace(plan=made, store=FolderStore(made.work), ledger=ledger, observer=Told())


def test_what_is_known_waits_for_nobody(workspace: Workspace):
    workspace.ledger.commit("Screening", "v", {"known": True}, RESULT)
    holding, done = threading.Event(), threading.Event()

    def hold() -> None:
        with reserve_cores(None, alone=True):
            holding.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert holding.wait(60)
    try:
        with with_cores_alone(workspace) as alone:
            assert alone.remember("Screening", "v", {"known": True}, lambda: RESULT) == (RESULT, True)
            assert not cores_alone()
    finally:
        done.set()
        holder.join()


def test_work_waits_until_another_campaign_has_measured(workspace: Workspace):
    order: list[str] = []
    holding = threading.Event()

    def hold() -> None:
        with reserve_cores(None, alone=True):
            holding.set()
            deadline = time.monotonic() + 60
            while not workspace.observer.notes and time.monotonic() < deadline:  # type: ignore[attr-defined]
                time.sleep(0.01)
            order.append("the other is done")

    def work() -> Failure:
        order.append("this one works")
        assert cores_alone()
        return RESULT

    holder = threading.Thread(target=hold)
    holder.start()
    assert holding.wait(60)
    with with_cores_alone(workspace) as alone:
        for number in range(2):
            alone.remember("Screening", f"v{number}", {"number": number}, work)
    holder.join()
    assert not cores_alone()
    assert order == ["the other is done", "this one works", "this one works"]
    assert workspace.observer.notes == [  # type: ignore[attr-defined]
        "Waiting for cores of this machine, which another campaign uses."
    ]
