"""Whether requests get their own answers, and from the right model, on servers that are wrong on demand."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from profiles.load.answerer import Answerer, answerer_of, find_stranger
from profiles.load.engine import LoadGenerator
from profiles.load.payloads import encode_payloads
from profiles.measure.equivalence import Reference, check_equivalence, far_apart, find_swaps
from profiles.testing import FakeV2Server
from registry.errors import InputError, UnreachableError
from registry.records import ClosedLoop, Equivalence, LoadProfile, RunRecord, Target
from tests.doubles.busy import undisturbed

Protocol = Literal["grpc", "rest"]
Answers = list[NDArray[np.float32]]
Split = Callable[[Answers], Answers]

CHANCE = np.random.default_rng(0)
X = CHANCE.normal(size=(64, 16)).astype("f4")
SUMS = Reference(outputs={"sum": X.sum(axis=1, keepdims=True)})
# All answers are so much alike that each passes for each within the tolerance.
ALIKE = np.concatenate([np.full((64, 1), 1000, "f4"), CHANCE.normal(size=(64, 15)).astype("f4")], axis=1)
TARGET = Target(url="127.0.0.1:1", protocol="grpc", model="m")


def check(
    split: Split = list,
    *,
    x: NDArray[np.float32] = X,
    protocol: Protocol = "grpc",
    known: bool = True,
    **more: Any,
) -> Equivalence:
    reference = Reference(outputs={"sum": x.sum(axis=1, keepdims=True)}) if known else None
    with FakeV2Server(split=split) as server:
        return check_equivalence(server.target(protocol), {"x": x}, reference=more.pop("reference", reference), **more)


def offset(answers: Answers) -> Answers:
    """The rows of the batch, cut one row too late."""
    rows = np.roll(np.concatenate(answers), -1, axis=0)
    return np.split(rows, np.cumsum([len(answer) for answer in answers])[:-1])


def of_the_first(answers: Answers) -> Answers:
    first = answers[0][0]
    return [np.broadcast_to(first, answer.shape) for answer in answers]


def swapped_once(answers: Answers) -> Answers:
    """The second and the third of a full batch of single rows change places."""
    if len(answers) < 8 or any(len(answer) > 1 for answer in answers):
        return answers
    return [answers[0], answers[2], answers[1], *answers[3:]]


@dataclass
class Noted:
    """Another split, and how often it changed anything: on a busy machine requests may come one by one."""

    split: Split
    times: int = 0

    def __call__(self, answers: Answers) -> Answers:
        given = self.split(answers)
        self.times += not all(map(np.array_equal, answers, given))
        return given


def check_of_changed(split: Split, **how: Any) -> Equivalence:
    noted = Noted(split)
    return undisturbed(lambda: check(noted, **how), lambda _: noted.times)


def all_rows(answers: Answers) -> Answers:
    return [np.concatenate(answers)] * len(answers)


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
@pytest.mark.parametrize("known", [True, False])
def test_a_right_server_passes(protocol: Protocol, known: bool) -> None:
    found = check(protocol=protocol, known=known, requests=32)
    assert found.reason == ""
    assert found.passed
    assert found.requests == 32
    assert found.rows > 40
    assert found.told_apart > 0.8 * found.rows
    assert found.worst < 1e-6


@pytest.mark.parametrize("split", [offset, of_the_first, swapped_once, lambda answers: answers[::-1]])
@pytest.mark.parametrize(("x", "known"), [(X, True), (X, False), (ALIKE, True)], ids=["known", "asked", "alike"])
def test_answers_that_go_to_others_are_found(split: Split, x: NDArray[np.float32], known: bool) -> None:
    found = check_of_changed(split, x=x, known=known, requests=128)
    assert "got the answer of another" in found.reason
    assert all(one != other for one, other in found.swapped)
    if x is ALIKE:
        assert found.worst < 0.05
        assert found.wrong <= 2 * len(found.swapped)


def test_a_swap_names_whose_answer_it_was() -> None:
    found = check_of_changed(swapped_once, concurrency=16, requests=256)
    pairs = set(found.swapped)
    assert pairs
    assert {(other, one) for one, other in pairs} == pairs


def test_a_wrong_number_of_rows_is_wrong() -> None:
    found = check(all_rows)
    assert found.wrong > 0
    assert "another shape" in found.reason


def test_wrong_values_are_found_only_by_a_reference_of_ones_own() -> None:
    added: Callable[[Answers], Answers] = lambda answers: [answer + 100 for answer in answers]  # noqa: E731
    assert check(added, known=False).passed
    found = check(added)
    assert found.wrong == found.requests
    assert "tolerance 5.0%" in found.reason


def test_a_server_that_fails_under_company_is_found() -> None:
    with FakeV2Server(fail_every=40) as server:
        found = check_equivalence(server.target("grpc"), {"x": X}, reference=SUMS)
    assert found.failed == 1
    assert "the model fell over" in found.reason


def test_answers_may_move_by_what_neighbours_move_them() -> None:
    def coarse(answers: Answers) -> Answers:
        largest = max(float(np.abs(answer).max()) for answer in answers)
        return [np.round(answer / largest * 4) * largest / 4 for answer in answers]

    allowed = Reference(outputs=SUMS.outputs, allowance={"sum": 3.0})
    assert check(coarse, reference=allowed).reason == ""
    assert check(coarse, reference=allowed).swapped == ()
    # What no neighbour explains is a swap all the same.
    little = Reference(outputs=SUMS.outputs, allowance={"sum": 0.1})
    assert "got the answer of another one" in check(offset, reference=little).reason
    assert check(coarse, requests=128).wrong > 0
    offset_too = check(lambda answers: coarse(offset(answers)), reference=allowed, requests=128)
    assert "another" in offset_too.reason


def test_constant_answers_cannot_be_told_apart_and_it_says_so() -> None:
    found = check(lambda answers: answers[::-1], x=np.ones((16, 4), "f4"), most_rows=1)
    assert found.passed
    assert found.told_apart == 0


def test_one_sample_is_enough_to_compare_values() -> None:
    found = check(x=X[:1], requests=8, concurrency=4)
    assert found.passed
    assert found.requests == 8


def test_a_budget_ends_it_after_two_bursts() -> None:
    assert check(requests=64, concurrency=4, budget_s=0.0).requests == 8


def test_a_refusal_is_told_in_the_servers_words() -> None:
    with FakeV2Server() as server, pytest.raises(UnreachableError, match="unknown model 'other'"):
        check_equivalence(replace(server.target("grpc"), model="other"), {"x": X}, reference=SUMS)


def test_no_samples() -> None:
    with FakeV2Server() as server, pytest.raises(InputError, match="no samples"):
        check_equivalence(server.target("grpc"), {"x": X[:0]})


# --- the parts ---------------------------------------------------------------------------------------------------


def test_samples_are_chosen_far_apart() -> None:
    near = CHANCE.normal(size=(30, 2)) * 0.01
    far = np.array([[10.0, 0], [0, 10], [-10, 0], [0, -10]])
    chosen = far_apart(np.concatenate([near, far]), 5)
    assert set(chosen) >= {30, 31, 32, 33}
    assert len(set(far_apart(np.zeros((6, 3)), 9))) == 6


def test_rounding_is_no_swap() -> None:
    expected = CHANCE.normal(size=(32, 8))
    noisy = expected + CHANCE.normal(scale=0.02, size=expected.shape)
    assert find_swaps(noisy, expected, range(32)) == ([], 32)
    swapped, _ = find_swaps(np.roll(noisy, 1, axis=0), expected, range(32))
    assert len(swapped) == 32


def test_a_sample_that_is_there_twice_is_told_from_the_others() -> None:
    expected = np.repeat(np.array([[1.0, 0], [0, 1], [-1, 0]]), 2, axis=0)
    assert find_swaps(expected, expected, [7, 7, 8, 8, 9, 9]) == ([], 6)


def test_near_twins_are_not_told_apart_in_noise() -> None:
    expected = np.repeat(CHANCE.normal(size=(8, 4)), 2, axis=0) + CHANCE.normal(scale=1e-3, size=(16, 4))
    swapped, told_apart = find_swaps(expected + CHANCE.normal(scale=0.01, size=(16, 4)), expected, range(16))
    assert swapped == []
    assert told_apart == 0


# --- who answered ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "headers", "said"),
    [
        ([("m", "", "")], {}, None),
        ([("m", "1", ""), ("m", "1", "")], {}, None),
        ([("", "", "")], {}, None),
        ([("other", "", "")], {}, "answered by 'other', not 'm'"),
        ([("m_1", "", "")], {}, "answered by 'm_1', not 'm'"),
        ([("m_1", "", "")], {"Seldon-Model": "m"}, None),
        ([("m_1", "", ":m_1:")], {}, None),
        ([("m_1", "", ":m_1:"), ("m_2", "", ":m_2:")], {}, "several versions of 'm': m_1, m_2"),
        ([("m_1", "", ":n_1:")], {}, "answered by 'n_1', not 'm'"),
        ([("mm_1", "", "")], {"seldon-model": "m"}, "answered by 'mm_1', not 'm'"),
        ([("m", "1", ""), ("m", "2", "")], {}, "several versions of 'm': 1, 2"),
        ([("a_1", "", ""), ("b_3", "", "")], {"seldon-model": "m.experiment"}, None),
    ],
)
def test_who_is_a_stranger(seen: list[tuple[str, str, str]], headers: dict[str, str], said: str | None) -> None:
    answerers = [Answerer(model=model, version=version, route=route) for model, version, route in seen]
    found = find_stranger(answerers, replace(TARGET, headers=headers))
    assert (found is None) if said is None else (found is not None and said in found)


def test_bytes_that_are_no_reply_say_nothing() -> None:
    assert answerer_of(b"\xff\xff", {}, TARGET) == Answerer(model="", version="")
    assert answerer_of(b"[1]", {}, replace(TARGET, protocol="rest")) == Answerer(model="", version="")


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_a_check_of_another_model_does_not_pass(protocol: Protocol) -> None:
    with FakeV2Server(answerer=lambda count: ("other", "")) as server:
        found = check_equivalence(server.target(protocol), {"x": X}, reference=SUMS, requests=8)
    assert found.reason == "answered by 'other', not 'm'"


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with LoadGenerator(None, tmp_path_factory.mktemp("generator")) as generator:
        yield generator


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"answerer": lambda count: ("other", "1")}, "'other'"),
        # In the middle of the window.
        ({"answerer": lambda count: ("m", "1" if count < 20 else "2")}, "several versions"),
        # In the first answer alone, before the warm-up.
        ({"answerer": lambda count: ("m", "7" if count == 1 else "1")}, "several versions"),
        ({"route": ":other_4:"}, "'other_4'"),
        ({"route": ":m_4:", "answerer": lambda count: ("m_4", "")}, None),
    ],
    ids=["another", "new version", "one connection", "another's route", "routed"],
)
def test_a_window_of_another_model_is_invalid(
    generator: LoadGenerator, tmp_path: Path, protocol: Protocol, fault: dict[str, Any], said: str | None
) -> None:
    # Longer where a busy machine comes to little in so short a time.
    lengths_s = itertools.chain([0.1, 0.5], itertools.repeat(3.0))

    def offer() -> RunRecord:
        profile = LoadProfile(name="test", load=ClosedLoop(concurrency=2), warmup_s=0.02, duration_s=next(lengths_s))
        with FakeV2Server(**fault) as server:
            target = server.target(protocol)
            payloads = encode_payloads({"x": X}, target=target)
            return generator.run(target, payloads, profile, raw_path=tmp_path / "w.npz")

    record = undisturbed(offer, lambda record: record.scheduled > 40)
    findings = [finding.observed for finding in record.findings if finding.gate == "answered_by"]
    assert [said in observed for observed in findings if said] == ([] if said is None else [True])
