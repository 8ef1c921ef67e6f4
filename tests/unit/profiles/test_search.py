"""The search for a serving profile, on made-up surfaces whose optimum is known."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from profiles.search import (
    InProcessCurve,
    Surface,
    curve_of,
    expected_improvement,
    highest_bound,
    lanes,
    search_serving,
    search_space,
)
from registry import codec
from registry.errors import InputError, StorageError, UnreachableError
from registry.records import EngineSpec, Estimate, Screening, ServingProfile, ServingSearch
from tests.doubles.surfaces import CORES, SERVERS

MLSERVER = search_space(cores=CORES, servers=("mlserver",), batch_sizes=(1, 2, 4, 8, 16), delays_ms=(1, 2, 5))
TRITON = search_space(cores=CORES, servers=("triton",), delays_ms=(0, 1, 2, 5))
NOISE = 0.03
SEEDS = 3


def rate(value: float, noise: float = NOISE) -> Estimate:
    low, high = value * math.exp(-1.96 * noise), value * math.exp(1.96 * noise)
    return Estimate(value=value, low=low, high=high, runs=1, method="made up", unit="1/s")


def noisy(rps: Callable[[ServingProfile], float], seed: int) -> Callable[[ServingProfile], Estimate]:
    chance = np.random.default_rng(seed)
    return lambda profile: rate(rps(profile) * math.exp(chance.normal(0, NOISE)))


# --- the space -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cores", [1, 2, 3, 4])
def test_no_profile_of_a_space_uses_more_threads_than_cores(cores: int) -> None:
    space = search_space(cores=cores)
    assert all(lanes(profile) * profile.threads <= cores for profile in space)
    assert len({profile.key for profile in space}) == len(space)
    for profile in space:
        if profile.max_batch_size == 1:
            assert profile.max_batch_delay_ms == 0
        elif profile.server == "mlserver":
            assert profile.max_batch_delay_ms > 0
        assert profile.instances == 1 or profile.server == "triton"
        assert profile.parallel_workers == 0 or profile.server == "mlserver"


def test_every_profile_of_a_space_may_be_written_into_a_campaign_file() -> None:
    # The rules of the campaign file are the optimize room's; here they must not differ.
    from optimize.config import ServingConfig

    for profile in search_space(cores=4):
        fields = codec.to_jsonable(profile)
        assert ServingConfig.model_validate(fields).profile() == profile


def test_spaces_of_the_recorded_kind_have_more_than_a_hundred_points() -> None:
    assert len(MLSERVER) == 130
    assert len(TRITON) == 126


@pytest.mark.parametrize("axes", [{"cores": 0}, {"cores": 1, "threads": (2,)}, {"cores": 1, "batch_sizes": (0,)}])
def test_a_space_without_profiles_is_refused(axes: dict[str, object]) -> None:
    with pytest.raises(InputError):
        search_space(**axes)  # type: ignore[arg-type]


# --- the bound -------------------------------------------------------------------------------------------------

CURVE = InProcessCurve(rows_per_s={(1, 1): 100.0, (8, 1): 300.0, (16, 1): 200.0})


def test_a_bound_takes_the_best_batch_that_may_be_and_counts_lanes() -> None:
    one = ServingProfile(server="triton", backend="python", max_batch_size=1)
    four = ServingProfile(server="triton", backend="python", max_batch_size=4, instances=2)
    large = ServingProfile(server="triton", backend="python", max_batch_size=64)
    assert CURVE.rate(one) == 100
    assert CURVE.rate(four) == 600  # as if it were of 8
    assert CURVE.rate(large) == 300
    assert CURVE.bound(large) > 300


def test_nothing_is_bound_where_nothing_is_known() -> None:
    threads = ServingProfile(server="triton", backend="python", threads=2)
    own = ServingProfile(server="triton", backend="onnxruntime")
    assert CURVE.bound(threads) == math.inf
    assert CURVE.bound(own) == math.inf


def test_a_curve_is_made_of_screenings() -> None:
    def screening(threads: int, **ms: tuple[float, float | None]) -> Screening:
        metrics = {
            f"inprocess_ms.{name}": Estimate(value=value, low=low, high=None, runs=5, method="m", unit="ms")
            for name, (value, low) in ms.items()
        }
        return Screening(variant_id="v", engine=EngineSpec(name="onnxruntime"), threads=threads, metrics=metrics)

    curve = curve_of([screening(1, batch_1=(10.0, 8.0), batch_4=(20.0, None)), screening(2, batch_1=(5.0, 5.0))])
    assert curve.rows_per_s == {(1, 1): 125.0, (4, 1): 200.0, (1, 2): 200.0}
    space = search_space(cores=2, batch_sizes=(1, 4), delays_ms=(1,))
    assert highest_bound(space, curve) == pytest.approx(1.2 * 400)


def test_what_cannot_pay_is_never_served() -> None:
    server = SERVERS["batching pays"]
    curve = server.curve()
    found = search_serving(MLSERVER, noisy(server.rps, 0), curve=curve, points=13)
    assert found.best is not None
    assert found.best.score is not None
    assert found.bounded_out > 20
    first = found.points[0].score
    assert first is not None
    # One worker is measured, whatever is known of it.
    promising = [point for point in found.points if point.reason != "the first with workers or instances 1"]
    assert all(curve.bound(point.profile) > first.value for point in promising)


# --- the model -------------------------------------------------------------------------------------------------


def test_the_surface_passes_through_what_was_seen_and_knows_least_far_away() -> None:
    surface = Surface(MLSERVER, None)
    mean, sd = surface.predict({0: (5.0, 0.01), 70: (3.0, 0.01)})
    assert mean[[0, 70]] == pytest.approx([5.0, 3.0], abs=0.05)
    assert sd[[0, 70]].max() < 0.02
    assert sd.max() > 0.1


def test_the_surface_learns_effects_that_multiply() -> None:
    rps = {place: 100 * lanes(profile) / (1 + (profile.protocol == "rest")) for place, profile in enumerate(MLSERVER)}
    shown = {place: (math.log(rps[place]), 0.01) for place in range(0, len(MLSERVER), 7)}
    mean, _ = Surface(MLSERVER, None).predict(shown)
    assert np.abs(mean - np.log(list(rps.values()))).max() < 0.1


def test_expected_improvement_is_that_of_a_normal_distribution() -> None:
    draws = np.random.default_rng(0).normal(1.0, 0.5, 1_000_000)
    gain = expected_improvement(np.array([1.0]), np.array([0.5]), 1.3)
    assert gain[0] == pytest.approx(np.maximum(draws - 1.3, 0).mean(), rel=0.02)


# --- the search ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [MLSERVER, TRITON], ids=["mlserver", "triton"])
@pytest.mark.parametrize("kind", SERVERS)
def test_a_tenth_of_the_points_finds_nearly_the_best(kind: str, space: tuple[ServingProfile, ...]) -> None:
    server = SERVERS[kind]
    most = max(server.rps(profile) for profile in space)
    shares = []
    for seed in range(SEEDS):
        answers = noisy(server.rps, seed)
        found = search_serving(space, answers, curve=server.curve(), points=len(space) // 10, seed=seed)
        assert found.best is not None
        assert found.share <= 0.1
        shares.append(server.rps(found.best.profile) / most)
    assert sorted(shares)[SEEDS // 2] >= 0.95
    assert min(shares) >= 0.9


def test_the_same_answers_give_the_same_search() -> None:
    server = SERVERS["workers pay"]
    first, second = (
        search_serving(TRITON, noisy(server.rps, 3), curve=server.curve(), points=9, seed=1) for _ in range(2)
    )
    assert first == second
    assert codec.loads(codec.dumps(first)) == first


def test_a_search_stops_where_no_other_profile_can_pay() -> None:
    flat = {profile.key: rate(100.0, 0.01) for profile in MLSERVER}
    found = search_serving(MLSERVER, lambda profile: flat[profile.key], points=len(MLSERVER))
    assert found.stopped == "nothing_pays"
    assert len(found.points) < len(MLSERVER) / 3
    assert "no other is expected to pay" in found.sentence


def test_a_small_space_is_looked_at_whole() -> None:
    chance = np.random.default_rng(0)
    found = search_serving(MLSERVER[:3], lambda _: rate(float(chance.uniform(1, 1000))), points=50)
    assert found.stopped == "exhausted"
    assert found.share == 1


def test_every_kind_is_looked_at_once() -> None:
    server = SERVERS["payload decides"]
    found = search_serving(MLSERVER, noisy(server.rps, 0), curve=server.curve(), points=13)
    looked = [point.profile for point in found.points]
    assert {profile.protocol for profile in looked} == {"grpc", "rest"}
    assert {profile.parallel_workers for profile in looked} == {0, 1, 2}
    assert {profile.threads for profile in looked} == {1, 2}


def test_maxima_are_told_for_one_worker_and_for_more() -> None:
    server = SERVERS["workers pay"]
    found = search_serving(TRITON, noisy(server.rps, 0), curve=server.curve(), points=12)
    assert found.maxima.keys() == {"1", "2"}  # the first of them, too, though in process it is known not to pay
    one, two = found.maxima["1"].score, found.maxima["2"].score
    assert one is not None
    assert two is not None
    assert two.value > 1.5 * one.value
    assert found.best == found.maxima["2"]


def test_profiles_that_are_named_come_first() -> None:
    named = (MLSERVER[40], ServingProfile(server="triton", backend="python", threads=9))
    found = search_serving(MLSERVER, lambda _: rate(1.0), points=2, start=named)
    assert found.points[0].profile == MLSERVER[40]
    assert found.points[0].reason == "it was named"


def test_a_profile_that_fails_is_a_point_and_its_like_are_avoided() -> None:
    server = SERVERS["batching pays"]

    def measure(profile: ServingProfile) -> Estimate:
        if profile.parallel_workers > 0:
            raise UnreachableError("the worker does not start")
        return rate(server.rps(profile))

    found = search_serving(MLSERVER, measure, curve=server.curve(), points=13)
    failed = [point for point in found.points if point.score is None]
    assert failed
    assert all(point.failure == "the worker does not start" for point in failed)
    assert found.best is not None
    assert found.best.profile.parallel_workers == 0
    assert len(failed) < 7


def test_a_search_in_which_all_fails_says_so() -> None:
    def measure(_: ServingProfile) -> Estimate:
        raise UnreachableError("no")

    found = search_serving(MLSERVER, measure, points=5)
    assert found.best is None
    assert found.maxima == {}
    assert "no profile could be served" in found.sentence


def test_a_folder_that_cannot_be_written_ends_the_search() -> None:
    def measure(_: ServingProfile) -> Estimate:
        raise StorageError("full")

    with pytest.raises(StorageError):
        search_serving(MLSERVER, measure, points=5)


def test_time_is_up() -> None:
    found = search_serving(MLSERVER, lambda _: rate(1.0), points=5, out_of_time=iter([False, False, True]).__next__)
    assert found.stopped == "minutes"
    assert len(found.points) == 2


@pytest.mark.parametrize(("space", "points"), [((), 1), (MLSERVER, 0)])
def test_nothing_to_look_at_is_refused(space: tuple[ServingProfile, ...], points: int) -> None:
    with pytest.raises(InputError):
        search_serving(space, lambda _: rate(1.0), points=points)


def test_the_best_is_not_the_luckiest_window() -> None:
    """One window that chance doubled does not win over many that agree, where it says itself that it is unsure."""
    luck = {MLSERVER[5].key: rate(110.0, 0.3)}
    answers: Mapping[str, Estimate] = {profile.key: rate(100.0, 0.01) for profile in MLSERVER} | luck
    found: ServingSearch = search_serving(
        MLSERVER, lambda profile: answers[profile.key], points=20, start=(MLSERVER[5],)
    )
    assert found.best is not None
    assert found.best.score is not None
    assert found.best.score.value <= 110


def test_looking_again_tells_the_best_from_the_lucky() -> None:
    lucky, best = MLSERVER[40], MLSERVER[41]
    true = {lucky.key: 100.0, best.key: 108.0}
    luck = {lucky.key: [1.1, 1.0, 1.0, 1.0], best.key: [0.95, 1.0, 1.0, 1.0]}

    def measure(profile: ServingProfile) -> Estimate:
        return rate(true[profile.key] * luck[profile.key].pop(0), 0.05)

    first = search_serving((lucky, best), measure, points=2)
    assert first.best is not None
    assert first.best.profile == lucky
    luck |= {lucky.key: [1.1, 1.0, 1.0, 1.0], best.key: [0.95, 1.0, 1.0, 1.0]}
    found = search_serving((lucky, best), measure, points=2, again=6)
    assert found.best is not None
    assert found.best.profile == best
    assert found.best.score is not None
    assert found.best.score.runs > 1
    assert len(found.points) == 2


def test_nothing_is_looked_at_again_where_the_best_is_certain() -> None:
    asked: list[str] = []

    def measure(profile: ServingProfile) -> Estimate:
        asked.append(profile.key)
        return rate(100.0 * (1 + MLSERVER.index(profile)), 0.01)

    search_serving(MLSERVER[40:43], measure, points=3, again=5)
    assert len(asked) == 3
