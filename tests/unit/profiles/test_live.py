"""Our own requests to champion and challenger, against servers that say who they are."""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest

from profiles.measure.live import RequestProbe, made_up, named_by, requests_needed, requests_watched, share
from profiles.testing import FakeV2Server, Fixed
from registry.errors import UnreachableError
from registry.records import PromotionStep, Target, TensorSpec
from tests.doubles.promotions import told

INPUTS = {"x": np.ones((8, 4), np.float32)}
MIRROR = PromotionStep(name="mirror", action="mirror", percent=100, watch_s=0.4)
ALL = PromotionStep(name="weights-100", action="weights", percent=100, watch_s=0.4)
SWAP = PromotionStep(name="swap", action="swap", percent=100, watch_s=0.4)


@pytest.fixture
def servers() -> Iterator[dict[str, FakeV2Server]]:
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(FakeV2Server(Fixed(0.001), model=name, route=f":{name}_3:"))
            for name in ("digits", "digits-challenger")
        }


def probe(servers: dict[str, FakeV2Server], *, protocol: str = "grpc", led: str = "", **more: object) -> RequestProbe:
    """A probe; ``led`` names who answers in production's place."""

    def target_of(name: str) -> Target:
        server = servers[led if led and name == "digits" else name]
        return server.target(protocol)

    return RequestProbe(
        production="digits", challenger="digits-challenger", target_of=target_of, inputs=INPUTS, rate_rps=1000, **more
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_half_go_where_callers_ask_and_half_to_the_challenger(servers: dict[str, FakeV2Server], protocol: str):
    seen = probe(servers, protocol=protocol).watch(MIRROR)
    assert seen.answered == {"champion": 200}
    assert seen.challenger["failed_share"].runs == 200
    assert seen.challenger["failed_share"].high == pytest.approx(3 / 200, rel=0.01)
    assert seen.challenger["latency_p50_ms"].value >= 1
    assert seen.champion["latency_p50_ms"].value >= 1
    assert seen.notes == ()


def test_who_answers_in_production_is_told_by_the_route(servers: dict[str, FakeV2Server]):
    seen = probe(servers, led="digits-challenger").watch(ALL)
    assert seen.answered == {"challenger": 200}
    assert seen.challenger["failed_share"].runs == 400
    assert seen.champion == {}


def test_somebody_else(servers: dict[str, FakeV2Server]):
    with FakeV2Server(model="digits", route=":stranger_1:") as stranger:
        seen = probe({**servers, "digits": stranger}).watch(MIRROR)
    assert seen.answered == {"others": 200}


@pytest.mark.parametrize(
    ("route", "who"),
    [
        (":digits_3:", {"digits"}),
        (":a_1::b_2:", {"a", "b"}),
        (":a_1::b_2: :digits.pipeline:", {"digits"}),
        (":digits-challenger.pipeline:", {"digits-challenger"}),
        (":a_1:, :digits.pipeline:", {"digits"}),
        ("", set()),
    ],
)
def test_a_route_names_the_model_or_the_pipeline(route: str, who: set[str]):
    assert named_by(route) == who


@pytest.mark.parametrize(("model", "who"), [("encoder", "champion"), ("encoder-int8", "challenger"), ("it", "others")])
def test_a_pipeline_that_is_not_named_is_told_by_the_models_that_it_alone_has(
    servers: dict[str, FakeV2Server], model: str, who: str
):
    only = {"encoder": "champion", "encoder-int8": "challenger"}
    with FakeV2Server(model="digits", route=f":tokens_1::{model}_1:") as server:
        seen = probe({**servers, "digits": server}, only=only).watch(MIRROR)
    assert seen.answered == {who: 200}


def test_replies_without_a_route_are_counted_as_nobodys(servers: dict[str, FakeV2Server]):
    with FakeV2Server(model="digits") as silent:
        seen = probe({**servers, "digits": silent}).watch(MIRROR)
    assert seen.answered == {"unnamed": 200}
    assert "no x-seldon-route" in seen.notes[0]


def test_failures_of_the_challenger(servers: dict[str, FakeV2Server]):
    with FakeV2Server(model="digits-challenger", fail_every=2, route=":digits-challenger_1:") as failing:
        both = {**servers, "digits-challenger": failing}
        mirrored = probe(both).watch(MIRROR)
        assert mirrored.challenger["failed_share"].value == pytest.approx(0.5, abs=0.1)
        assert "latency_p90_ms" not in mirrored.challenger
        assert mirrored.notes[0].startswith("failed: ")
        # What fails where callers ask is the challenger's, once it has a share; callers do not bear with it for long.
        shared = probe(both, led="digits-challenger").watch(replace(ALL, watch_s=60.0))
        assert shared.challenger["failed_share"].runs < 30_000
        assert shared.challenger["failed_share"].value == pytest.approx(0.5, abs=0.1)


def test_few_failures_are_watched_to_the_end(servers: dict[str, FakeV2Server]):
    with FakeV2Server(model="digits-challenger", fail_every=40, route=":digits-challenger_1:") as failing:
        seen = probe({**servers, "digits-challenger": failing}).watch(MIRROR)
    assert (seen.challenger["failed_share"].value, seen.challenger["failed_share"].runs) == (5 / 200, 200)


def test_in_the_champions_place(servers: dict[str, FakeV2Server]):
    seen = probe(servers).watch(SWAP)
    assert (seen.answered, seen.champion) == ({"challenger": 400}, {})
    assert seen.challenger["failed_share"].runs == 400


def test_in_the_champions_place_without_a_route():
    """Whoever answers there is the challenger; that it does is not known, and is said."""
    with FakeV2Server(Fixed(0.001), model="digits") as silent:
        seen = probe({"digits": silent}).watch(SWAP)
    assert seen.answered == {"unnamed": 400}
    assert (seen.challenger["failed_share"].value, seen.challenger["failed_share"].runs) == (0, 400)
    assert seen.challenger["latency_p90_ms"].value >= 1
    assert "no x-seldon-route" in seen.notes[0]


def test_nobody_there():
    with FakeV2Server(model="digits") as gone:
        target = gone.target("grpc")
    lost = RequestProbe(production="digits", challenger="c", target_of=lambda _: target, inputs=INPUTS, rate_rps=100)
    with pytest.raises(UnreachableError):
        lost.watch(MIRROR)


def test_fidelity_is_of_the_challenger_itself(servers: dict[str, FakeV2Server]):
    asked: list[str] = []

    def judge(target: Target) -> dict[str, object]:
        asked.append(target.model)
        return {"accuracy": told(0.9, "fraction")}

    one = probe(servers, fidelity=judge, judged=frozenset({"accuracy"}))
    assert one.watch(MIRROR).challenger["accuracy"].value == 0.9
    assert asked == ["digits-challenger"]
    assert one.sees("accuracy")
    assert one.sees("latency_p99_ms")
    assert not probe(servers).sees("accuracy")
    assert not one.sees("rss_mb")


def test_shares_have_exact_ends():
    # Clopper and Pearson's own example: of 10 none, 0.2589 at 95 % to one side.
    assert share(0, 10).high == pytest.approx(0.2589, abs=1e-4)
    assert share(10, 10).low == pytest.approx(0.7411, abs=1e-4)
    both = share(3, 10)
    assert (both.low, both.high) == (pytest.approx(0.0667, abs=1e-4), pytest.approx(0.6525, abs=1e-4))
    assert share(0, 299).high < 0.01 < share(0, 298).high


def test_how_many_requests_a_limit_takes():
    assert requests_needed("failed_share") == 299
    assert requests_needed("latency_p90_ms") == math.ceil(1.2 * 5 * 34)
    assert requests_needed("rss_mb") == 0
    assert requests_watched(25, 60) == 750


def test_samples_that_are_made_up_fit():
    inputs = (
        TensorSpec(name="x", dtype="float32", shape=("batch", 3, None)),
        TensorSpec(name="ids", dtype="int64", shape=(None, 2)),
        TensorSpec(name="on", dtype="bool", shape=("batch",)),
    )
    made = made_up(inputs)
    assert {name: (one.dtype.name, one.shape) for name, one in made.items()} == {
        "x": ("float32", (8, 3, 1)), "ids": ("int64", (8, 2)), "on": ("bool", (8,)),
    }  # fmt: skip
