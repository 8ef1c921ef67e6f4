"""How far a campaign is, and how long the rest of a phase may take."""

import pytest

from optimize.progress import Phase, Progress, Running, duration, remaining, working


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def progress(clock: Clock) -> Progress:
    return Progress(clock)


def work(progress: Progress, clock: Clock, subject: str, *pieces: float) -> None:
    """One unit, worked on in pieces that take so many seconds."""
    for number, seconds in enumerate(pieces):
        with working(progress, f"kind {number}", f"piece {number} of {subject}"):
            clock.now += seconds
    progress.done(subject, "well")


def test_nothing_is_said_before_anything_is_known(progress: Progress, clock: Clock):
    assert progress.current is None
    assert progress.left_s is None
    progress.phase("Making", 3)
    progress.begun("Variant", "a")
    clock.now += 500
    assert progress.left_s is None


def test_the_rest_takes_as_long_as_most_did(progress: Progress, clock: Clock):
    progress.phase("Measuring", 6)
    for seconds in (10.0, 12.0, 300.0):
        work(progress, clock, "x", seconds)
    assert progress.current is not None
    assert progress.current.median_s == 12.0
    assert progress.left_s == 3 * 12.0
    progress.begun("Round", "r")
    clock.now += 5
    assert progress.left_s == 3 * 12.0 - 5
    clock.now += 500  # slower than any before it: at least what is behind it remains
    assert progress.left_s == 2 * 12.0


def test_a_unit_takes_what_its_pieces_take(progress: Progress, clock: Clock):
    progress.phase("Finding capacities", 3)
    work(progress, clock, "a", 1.0, 2.0, 7.0)
    assert progress.left_s == 20.0
    with working(progress, "Deployed", "b"):
        clock.now += 4
    assert progress.left_s == 16.0


def test_what_was_known_says_nothing_of_the_time(progress: Progress, clock: Clock):
    progress.phase("Measuring", 4)
    progress.done("a", "round 1 (known)")
    progress.done("b", "left out: it failed")
    assert progress.left_s is None
    work(progress, clock, "c", 8.0)
    assert progress.left_s == 8.0
    assert progress.current is not None
    assert (progress.current.done, progress.current.timed) == (3, 1)


def test_several_at_once_share_the_rest(progress: Progress, clock: Clock):
    progress.phase("Making variants", 6)
    for name in "abc":
        progress.begun("Variant", name)
    clock.now += 10
    for name in "ab":
        progress.ended("Variant", name)
        progress.done(name, "1 MB")
    for name in "de":
        progress.begun("Variant", name)
    assert progress.current is not None
    assert progress.current.median_s == 10.0
    # Four are left, of which c is nearly done, on three lanes.
    assert progress.left_s == pytest.approx((4 * 10 - 10) / 3)
    assert {one.subject for one in progress.running} == set("cde")


def test_a_search_in_which_others_run_is_one_lane(progress: Progress, clock: Clock):
    progress.phase("Leaving nodes in float32", 4)
    progress.begun("AccuracySearch", "int8")
    for number in range(2):
        with working(progress, "SearchTrial", f"trial {number}"):
            clock.now += 6
        progress.done(f"trial {number}", "fail")
    assert progress.left_s == 12.0


def test_a_task_that_begins_anew_elsewhere_is_one(progress: Progress, clock: Clock):
    progress.phase("Making variants", 1)
    progress.begun("Variant", "a", "node-1")
    clock.now += 60
    progress.begun("Variant", "a", "node-2")
    assert progress.running == (Running(kind="Variant", subject="a", since=1060.0, where="node-2"),)


def test_failures_and_phases_are_counted(progress: Progress, clock: Clock):
    progress.phase("Sources", 1)
    progress.done("model", "1 MB")
    progress.phase("Judging answers", 2)
    progress.done("a", "failed: it was killed")
    assert progress.past == (Phase(name="Sources", total=1, began=1000.0, turned=1000.0, done=1),)
    assert progress.current is not None
    assert (progress.current.done, progress.current.failed) == (1, 1)


def test_more_than_was_expected_leaves_nothing(progress: Progress):
    progress.phase("Searching", 1)
    for name in "ab":
        progress.done(name, "tried")
    assert progress.left_s == 0


def test_an_end_without_a_begin_is_passed_over(progress: Progress):
    progress.phase("Making", 2)
    progress.ended("Variant", "never begun")
    progress.done("never begun", "not applicable")
    assert progress.left_s is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"), (59.4, "59 s"), (60, "1 min"), (160, "2 min 40 s"), (1000, "17 min"), (3600, "1 h"),
        (11100, "3 h 5 min"),
    ],
)  # fmt: skip
def test_lengths_of_time_in_words(seconds: float, words: str):
    assert duration(seconds) == words


def test_the_rest_in_words():
    assert remaining(None) == "time left not known yet"
    assert remaining(75) == "about 1 min 15 s left"
    assert remaining(0.2) == "due now"
