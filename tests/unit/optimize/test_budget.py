"""A campaign's time."""

import math
import time

import pytest

from optimize import budget
from optimize.budget import UNLIMITED, Budget
from registry.errors import BudgetUsedUpError


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the monotonic clock says, which only a test moves."""
    now = [100.0]
    monkeypatch.setattr(budget, "monotonic", lambda: now[0])
    return now


def test_without_minutes_there_is_no_end():
    assert Budget.from_now(None) == UNLIMITED
    assert UNLIMITED.left_s == math.inf
    assert UNLIMITED.begin_by is None
    assert UNLIMITED.preparing() == UNLIMITED
    UNLIMITED.check()
    UNLIMITED.keeping(1e9, "others").check()


def test_nothing_is_begun_once_it_is_used_up(clock: list[float]):
    given = Budget.from_now(2)
    given.check()
    before = time.time()
    assert given.begin_by is not None
    assert before + 120 <= given.begin_by <= time.time() + 120
    clock[0] += 121
    assert given.is_used_up
    assert given.left_s == 0
    with pytest.raises(BudgetUsedUpError) as caught:
        given.check()
    assert caught.value.message == "the budget of 2 minutes was used up"
    assert caught.value.exit_code == 3
    assert "more minutes" in (caught.value.hint or "")


def test_what_is_kept_for_something_else_is_not_taken(clock: list[float]):
    given = Budget.from_now(10)
    clock[0] += 120
    before = given.preparing()
    assert before.left_s == pytest.approx(0.5 * 8 * 60)
    kept = given.keeping(400, "the rounds of others")
    assert kept.left_s == pytest.approx(80)
    clock[0] += 81
    with pytest.raises(BudgetUsedUpError, match="of 10 minutes was used up, but for what is kept for the rounds of"):
        kept.check()
    given.check()
    clock[0] += 400
    with pytest.raises(BudgetUsedUpError, match=r"was used up\n"):
        kept.check()
