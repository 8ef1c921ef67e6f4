"""What a million inferences cost."""

from pathlib import Path

import pytest

from profiles.measure.cost import HardwareConfig, cost_per_million, find_hardware, load_hardware, with_costs
from registry.documents import parse_document
from registry.errors import DocumentError, InputError
from registry.records import Estimate, HardwareProfile, Measurement

PRICED = HardwareProfile(
    name="mine", cores=4, price_per_hour=0.36, currency="EUR", price_source="a contract", price_date="2026-01-31"
)
RATE = Estimate(value=100.0, low=100.0, high=125.0, runs=1, method="stage grid", unit="1/s")


def test_a_million_at_a_hundred_a_second_takes_10_000_seconds() -> None:
    cost = cost_per_million(RATE, PRICED, metric="saturation_rps", cores=None)
    assert cost is not None
    assert cost.value == pytest.approx(0.36 * 10_000 / 3600)
    assert (cost.low, cost.high) == pytest.approx((0.8, 1.0))
    assert (cost.unit, cost.method) == ("EUR", "0.36 EUR an hour over saturation_rps")


def test_a_server_pays_for_its_share_of_the_cores() -> None:
    cost = cost_per_million(RATE, PRICED, metric="saturation_rps", cores=1)
    assert cost is not None
    assert cost.value == pytest.approx(0.25)
    assert cost.method == "0.09 EUR an hour (1 of 4 cores) over saturation_rps"


def test_a_machine_with_a_gpu_is_paid_whole() -> None:
    with_gpu = HardwareProfile(name="g", cores=4, gpus=1, price_per_hour=0.36, currency="EUR")
    cost = cost_per_million(RATE, with_gpu, metric="saturation_rps", cores=1)
    assert cost is not None
    assert cost.value == pytest.approx(1.0)


def test_an_end_that_is_not_known_is_not_known_of_the_cost() -> None:
    rate = Estimate(value=100.0, low=100.0, high=None, runs=1, method="stage grid", unit="1/s")
    cost = cost_per_million(rate, PRICED, metric="saturation_rps", cores=None)
    assert cost is not None
    assert (cost.low, cost.high) == (None, pytest.approx(1.0))


def test_without_a_price_or_a_rate_there_is_no_cost() -> None:
    zero = Estimate(value=0.0, low=None, high=None, runs=1, method="", unit="1/s")
    assert cost_per_million(zero, PRICED, metric="saturation_rps", cores=None) is None
    assert cost_per_million(RATE, HardwareProfile(name="m", cores=4), metric="saturation_rps", cores=None) is None


def measurement(candidate: str, load: str | None = None, **rates: Estimate) -> Measurement:
    return Measurement(candidate_id=candidate, load=load, metrics=rates)


def test_all_candidates_are_counted_by_the_same_rate() -> None:
    slow = Estimate(value=50.0, low=None, high=None, runs=1, method="", unit="1/s")
    both = [measurement("a", saturation_rps=RATE, slo_max_rps=slow), measurement("b", saturation_rps=RATE)]
    costs = [one.metrics["cost_per_million"] for one in with_costs(both, PRICED, cores=None)]
    assert [cost.value for cost in costs] == pytest.approx([1.0, 1.0])
    (one,) = with_costs(both[:1], PRICED, cores=None)
    assert one.metrics["cost_per_million"].value == pytest.approx(2.0)


def test_costs_stand_beside_the_rate_and_nowhere_else() -> None:
    given = [measurement("a", saturation_rps=RATE), measurement("a", "100 rps", saturation_rps=RATE), measurement("b")]
    assert ["cost_per_million" in one.metrics for one in with_costs(given, PRICED, cores=None)] == [True, False, False]
    assert with_costs(given, None, cores=None) == tuple(given)


def test_shipped_profiles_have_no_price() -> None:
    assert {profile.price_per_hour for profile in load_hardware().values()} == {None}
    assert find_hardware("cpu-2").cores == 2
    with pytest.raises(InputError, match="no hardware profile 'cpu-3'"):
        find_hardware("cpu-3")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{name: m, cores: 2, price_per_hour: 1}", "needs currency, price_source, price_date"),
        ("{name: m, cores: 0}", "cores"),
        ("{name: m, cores: 2, price_per_hour: -1}", "price_per_hour"),
        ("{name: m, cores: 2, currency: euro}", "currency"),
    ],
)
def test_a_price_is_told_whole(text: str, why: str) -> None:
    with pytest.raises(DocumentError, match=why):
        parse_document(text, HardwareConfig, name="hardware.yaml")


def test_a_file_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "hardware.yaml"
    price = "price_per_hour: 0.36, currency: EUR, price_source: a contract, price_date: 2026-01-31"
    path.write_text(f"hardware:\n  - {{name: plain, cores: 3}}\n  - {{name: mine, cores: 4, {price}}}\n")
    assert load_hardware(path) == {"plain": HardwareProfile(name="plain", cores=3), "mine": PRICED}
