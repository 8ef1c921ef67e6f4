"""What saturates, what decides latency, and slack: against exhaustive search, closed forms and a simulation."""

import math

import numpy as np
import pytest

from profiles.pipelines.analysis import (
    HOST,
    analyse,
    gain_of,
    limits,
    overhead_of,
    path_through,
    pipeline_limits,
    predict_latency,
    slacks,
    slowest_walk,
    stations_of,
)
from profiles.pipelines.documents import SpecPart, read_spec
from profiles.pipelines.graph import Pipeline, visits
from profiles.pipelines.measured import (
    Measured,
    Station,
    StepNumbers,
    WholeNumbers,
    load_measured,
    station_of,
    thin,
    write_measured,
)
from profiles.pipelines.queueing import departures, erlang_c, mean_wait
from registry.errors import InputError
from tests.doubles.pipelines import (
    all_paths,
    measured_of,
    numbers,
    random_pipeline,
    simulate,
    slowest_by_search,
    visits_by_search,
)


def chain(*names: str) -> Pipeline:
    steps = [{"name": name, **({"inputs": [names[n - 1]]} if n else {})} for n, name in enumerate(names)]
    return read_spec("p", SpecPart.model_validate({"steps": steps, "output": {"steps": [names[-1]]}}))


def fork(join: str = "inner", **more) -> Pipeline:
    steps = [{"name": "a"}, {"name": "b"}, {"name": "c", "inputs": ["a", "b"], "inputsJoinType": join, **more}]
    return read_spec("p", SpecPart.model_validate({"steps": steps, "output": {"steps": ["c"]}}))


def measured(**steps: float) -> Measured:
    return Measured(steps={name: {"a": numbers(mean)} for name, mean in steps.items()})


@pytest.mark.parametrize("seed", range(60))
def test_paths_and_bottleneck_are_those_of_exhaustive_search(seed: int):
    chance = np.random.default_rng(seed)
    pipeline = random_pipeline(chance, steps=int(chance.integers(1, 8)))
    times = {name: float(chance.uniform(1, 20)) for name in pipeline.names}
    searched = visits_by_search(pipeline)
    assert visits(pipeline) == pytest.approx(searched)
    rates = {name: 1000 / times[name] / searched[name] for name in times if searched[name]}
    found = limits(pipeline, {name: 1000 / time for name, time in times.items()})[0]
    assert (found.what, found.rate_rps) == (min(rates, key=rates.__getitem__), pytest.approx(min(rates.values())))
    holding = [path for path in all_paths(pipeline) if found.what in path]
    assert path_through(pipeline, times, found.what) == max(holding, key=lambda path: sum(times[one] for one in path))
    slowest = slowest_by_search(pipeline, times)
    if slowest is None:
        with pytest.raises(InputError, match="never answers"):
            slowest_walk(pipeline, times)
    else:
        walk = slowest_walk(pipeline, times)
        assert (walk.end_ms, walk.path) == (pytest.approx(slowest[0]), slowest[1])


def test_slack_is_what_a_step_can_lose_before_anybody_waits_longer():
    assert slacks(fork(), {"a": 5.0, "b": 12.0, "c": 3.0}) == pytest.approx({"a": 7.0, "b": 0.0, "c": 0.0})
    by_any = slacks(fork("any"), {"a": 5.0, "b": 12.0, "c": 3.0})
    assert by_any == {"a": 0.0, "b": math.inf, "c": 0.0}


def test_an_outer_join_ends_its_window_where_something_never_comes():
    steps = [
        {"name": "a"},
        {"name": "b", "inputs": ["a.outputs.x"]},
        {"name": "c", "inputs": ["a", "b"], "inputsJoinType": "outer", "joinWindowMs": 50},
    ]
    spec = SpecPart.model_validate({"steps": steps, "output": {"steps": ["c"]}})
    pipeline = read_spec("p", spec, routes={"a": {"x": 0.5}})
    assert slowest_walk(pipeline, {"a": 1.0, "b": 2.0, "c": 4.0}).end_ms == 1 + 50 + 4


def test_servers_that_share_cpus_are_limited_together():
    found = limits(chain("a", "b"), {"a": 100, "b": 120}, cpu_ms={"a": 10, "b": 8}, shared_cpus=1)
    assert (found[0].what, found[0].rate_rps) == (HOST, pytest.approx(1000 / 18))


def test_the_share_of_one_cpu_that_steps_can_use_counts_by_the_time_that_each_takes():
    def step(cpu_ms: float, busy: float | None) -> dict[str, StepNumbers]:
        return {"x": StepNumbers(latency_ms=(1.0,), saturation_rps=5000, cpu_ms=cpu_ms, busy_cpus=busy)}

    def limit(cpus: float, **steps: dict[str, StepNumbers]) -> float:
        return pipeline_limits(chain(*steps), Measured(steps=steps, shared_cpus=cpus))[0].rate_rps

    assert limit(1, a=step(6, 0.8), b=step(2, 1.0)) == pytest.approx(1000 / 8 * 0.85)
    assert limit(1, a=step(6, 0.8), b=step(2, 1.3)) == pytest.approx(1000 / 8 * 0.85), "more than all is none"
    assert limit(1, a=step(6, 0.8), b=step(2, None)) == pytest.approx(1000 / 8 * 0.8)
    assert limit(1, a=step(6, None), b=step(2, None)) == pytest.approx(1000 / 8)
    assert limit(2, a=step(6, 0.8), b=step(2, 1.0)) == pytest.approx(2000 / 8)


def test_a_cycle_or_a_step_without_numbers_is_refused():
    steps = [{"name": "a", "inputs": ["p.inputs", "b"], "inputsJoinType": "any"}, {"name": "b", "inputs": ["a"]}]
    spec = SpecPart.model_validate(
        {"steps": steps, "output": {"steps": ["b"]}, "allowCycles": True, "maxStepRevisits": 2}
    )
    with pytest.raises(InputError, match="goes round") as refused:
        analyse(read_spec("p", spec), measured(a=1.0, b=2.0))
    assert "saturates at 166.7 requests a second, at b" in str(refused.value.hint)  # 500 a second, three times each
    with pytest.raises(InputError, match="'b' is unknown: it was not measured") as refused:
        analyse(chain("a", "b"), measured(a=1.0))
    assert "burnish pipeline measure" in str(refused.value.hint)
    with pytest.raises(InputError, match="beyond its saturation"):
        analyse(chain("a"), measured(a=10.0), rate_rps=101)


# --- queues ----------------------------------------------------------------------------------------------------


def exponential(mean_ms: float, servers: int = 1) -> Station:
    quantiles = -np.log1p(-(np.arange(2000) + 0.5) / 2000)
    return Station(servers=servers, services_ms=mean_ms * quantiles / quantiles.mean())


def test_a_tandem_of_exponential_servers_has_the_latency_of_its_closed_form():
    # Burke (1956): each of M/M/1 in a row is M/M/1, and sojourns are independent: a sum of exponentials.
    found = predict_latency(chain("a", "b"), {"a": exponential(6.0), "b": exponential(4.0)}, 100.0, requests=400_000)
    rates = (1 / 6.0 - 0.1, 1 / 4.0 - 0.1)
    assert found.mean_ms.value == pytest.approx(sum(1 / rate for rate in rates), rel=0.04)

    def beyond(t: float) -> float:
        first, second = rates
        return (second * math.exp(-first * t) - first * math.exp(-second * t)) / (second - first)

    for percentile, within in ((50, 0.03), (99, 0.08)):
        assert beyond(found.percentiles[percentile].value * (1 - within)) > 1 - percentile / 100
        assert beyond(found.percentiles[percentile].value * (1 + within)) < 1 - percentile / 100


@pytest.mark.parametrize("servers", [1, 2, 5])
def test_sampled_waits_are_those_of_erlang(servers: int):
    rate = 0.7 * servers / 0.010
    found = predict_latency(chain("a"), {"a": exponential(10.0, servers)}, rate, requests=300_000)
    assert found.steps["a"].wait_ms == pytest.approx(mean_wait(rate / 1000, servers=servers, service=10.0), rel=0.08)
    assert found.steps["a"].utilisation == pytest.approx(0.7, rel=0.02)


def test_the_formulas_hold_where_they_are_exact():
    assert erlang_c(1, 0.6) == pytest.approx(0.6)
    assert mean_wait(0.08, servers=1, service=10.0, variability=0.0) == pytest.approx(20.0)  # M/D/1
    assert mean_wait(0.2, servers=2, service=10.0) == math.inf
    left = departures(np.array([0.0, 1.0, 2.0, 20.0]), np.array([5.0, 5.0, 5.0, 5.0]), 1)
    assert left.tolist() == [5, 10, 15, 25]
    assert departures(np.array([0.0, 1.0, 2.0]), np.array([5.0, 5.0, 5.0]), 2).tolist() == [5, 6, 10]


@pytest.mark.parametrize("seed", [3, 4])
def test_latency_is_that_of_a_simulation(seed: int):
    chance = np.random.default_rng(seed)
    pipeline = random_pipeline(chance, steps=4, joins=("inner", "any"))
    known = measured_of(pipeline, chance, workers=2)
    stations = stations_of(pipeline, known)
    first = limits(pipeline, {name: station.capacity_rps for name, station in stations.items()})[0]
    rate = 0.6 * first.rate_rps
    found = predict_latency(pipeline, stations, rate, requests=60_000)
    services = {name: station.services_ms.tolist() for name, station in stations.items()}
    simulated = simulate(pipeline, services, dict.fromkeys(pipeline.names, 2), rate, requests=12_000, seed=seed)
    for percentile in (50, 99):
        assert found.percentiles[percentile].value == pytest.approx(np.percentile(simulated, percentile), rel=0.1)


# --- what was measured -----------------------------------------------------------------------------------------


def test_a_station_saturates_where_it_was_measured_to():
    slow = numbers(10.0, spread=0.5).model_copy(update={"saturation_rps": 80.0})
    assert station_of(slow).capacity_rps == pytest.approx(80)
    assert station_of(slow).mean_ms == pytest.approx(12.5)
    quick = numbers(10.0).model_copy(update={"saturation_rps": 200.0})
    assert (station_of(quick).mean_ms, station_of(quick).delay_ms) == (pytest.approx(5), pytest.approx(5))
    assert station_of(quick, replicas=3).capacity_rps == pytest.approx(600)


def test_what_was_measured_is_kept_as_it_is(tmp_path):
    known = measured_of(chain("a", "b"), np.random.default_rng(0))
    whole = WholeNumbers(latency_ms=(20.0,), saturation_rps=50.0, variants={"a": "a"}, without="no Kafka")
    known = Measured(steps=known.steps, whole=whole, host="h", shared_cpus=2.0)
    write_measured(known, tmp_path / "m.yaml")
    again = load_measured(tmp_path / "m.yaml", chain("a", "b"))
    assert again == known
    with pytest.raises(InputError, match="no step"):
        load_measured(tmp_path / "m.yaml", chain("a"))


def test_latencies_are_thinned_without_moving_their_mean():
    latencies = np.random.default_rng(0).gamma(2, 5, 40_000)
    kept = np.array(thin(latencies))
    assert len(kept) == 400
    assert kept.mean() == pytest.approx(latencies.mean(), rel=1e-3)
    assert np.percentile(kept, 99) == pytest.approx(np.percentile(latencies, 99), rel=0.02)


def test_a_faster_variant_off_the_bottleneck_buys_nothing_and_that_is_said():
    known = Measured(
        steps={"a": {"fp32": numbers(1.0), "int8": numbers(0.98)}, "b": {"fp32": numbers(20.0), "int8": numbers(10.0)}}
    )
    pipeline = chain("a", "b")
    nothing = gain_of(pipeline, known, "a", "int8", rate_rps=20, requests=20_000)
    assert nothing.word == "nothing"
    assert "gains nothing: b saturates first" in nothing.sentence
    much = gain_of(pipeline, known, "b", "int8", rate_rps=20, requests=20_000)
    assert much.word == "gains"
    assert much.saturation_rps == (pytest.approx(50), pytest.approx(100))


def test_what_a_stage_takes_is_what_the_whole_takes_more():
    known = measured(a=5.0, b=7.0)
    assert overhead_of(chain("a", "b"), known) is None
    whole = Measured(steps=known.steps, whole=WholeNumbers(latency_ms=(16.0,)))
    found = overhead_of(chain("a", "b"), whole)
    assert found is not None
    assert found.per_stage_ms == pytest.approx(2.0)


def test_an_analysis_tells_paths_and_slack():
    found = analyse(fork(), measured(a=5.0, b=12.0, c=3.0), rate_rps=20, requests=20_000)
    assert (found.bottleneck.what, found.throughput_path, found.latency_path) == ("b", ("b", "c"), ("b", "c"))
    assert found.slack_ms["a"] > 5
    assert found.latency.steps["b"].decides > 0.95
    assert found.latency.paths[0][0] == ("b", "c")
