import numpy as np
import pytest

from profiles.measure.usl import UslFit, explain_fit, find_knee, fit_usl

LADDER = (1, 2, 4, 8, 16, 32)


def law(sigma: float, kappa: float, gamma: float = 100.0) -> list[tuple[int, float]]:
    return [(n, gamma * n / (1 + sigma * (n - 1) + kappa * n * (n - 1))) for n in LADDER]


@pytest.mark.parametrize(("sigma", "kappa"), [(0.0, 0.0), (0.1, 0.0), (0.05, 0.002), (0.9, 0.0)])
def test_the_law_is_found_again(sigma: float, kappa: float) -> None:
    fit = fit_usl(law(sigma, kappa))
    assert isinstance(fit, UslFit)
    assert fit.gamma.value == pytest.approx(100)
    assert fit.sigma.value == pytest.approx(sigma, abs=1e-9)
    assert fit.kappa.value == pytest.approx(kappa, abs=1e-9)
    assert fit.worst < 1e-9
    assert (fit.peak is None) == (kappa == 0)
    if kappa:
        assert fit.peak == pytest.approx(np.sqrt((1 - sigma) / kappa))


def test_a_server_that_batches_all_that_waits_shows_the_cost_of_a_sample() -> None:
    a_ms, c_ms = 5.0, 0.6
    fit = fit_usl([(n, 1000 * n / (a_ms + c_ms * n)) for n in LADDER])
    assert isinstance(fit, UslFit)
    assert fit.sigma.value == pytest.approx(c_ms / (a_ms + c_ms))
    assert fit.gamma.value == pytest.approx(1000 / (a_ms + c_ms))
    assert explain_fit(fit) == (
        "11% of the work cannot be done side by side (at most 9.33 times the rate of one request at a time)"
    )


def test_a_largest_batch_size_is_no_such_law() -> None:
    plateau = [(n, 1000 * n / (5 + 0.6 * min(n, 8)) * min(n, 8) / n) for n in LADDER]
    told = fit_usl(plateau)
    assert isinstance(told, str)
    assert "does not fit" in told
    assert find_knee(plateau) == 8


def test_too_few_points_fit_anything() -> None:
    told = fit_usl([*law(0.1, 0)[:5], (1, 99.0)])
    assert told == "no law is fitted: 5 concurrencies were tried, it takes 6"


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    chance = np.random.default_rng(31)
    held = []
    for _ in range(40):
        noisy = [(n, rps * (1 + chance.normal(0, 0.01))) for n, rps in law(0.05, 0.002) for _ in range(2)]
        fit = fit_usl(noisy)
        assert isinstance(fit, UslFit)
        held.append([
            low <= true <= high
            for true, low, high in [
                (0.05, fit.sigma.low or 0, fit.sigma.high or 0), (0.002, fit.kappa.low or 0, fit.kappa.high or 0),
            ]
        ])  # fmt: skip
    assert np.mean(held) >= 0.85


def test_a_peak_is_told_only_where_it_is_certain() -> None:
    sure = fit_usl(law(0.05, 0.002))
    assert isinstance(sure, UslFit)
    assert "falls beyond 22 outstanding" in explain_fit(sure)
    free = fit_usl(law(0, 0))
    assert isinstance(free, UslFit)
    assert explain_fit(free) == "0% of the work cannot be done side by side"


def test_the_knee_is_where_the_plateau_begins() -> None:
    assert find_knee([(1, 50), (2, 90), (4, 96), (8, 100)]) == 4
    assert find_knee([(4, 100), (1, 50), (8, 80)]) == 4
    assert find_knee([(1, 99), (1, 101), (2, 104)]) == 1
    assert find_knee([]) is None
    assert find_knee([(1, 0.0)]) is None


def test_a_server_that_breaks_down_follows_no_such_law() -> None:
    told = fit_usl([(n, 1000 / n**2) for n in (8, 16, 32, 64, 128, 256)])
    assert isinstance(told, str)
    assert told.startswith("the Universal Scalability Law does not fit: throughput falls faster")


@pytest.mark.parametrize("sigma", [0.999, 1.0, 1.02])
def test_a_server_with_one_worker_gains_nothing(sigma: float) -> None:
    fit = fit_usl(law(sigma, 0))
    assert isinstance(fit, UslFit)
    assert explain_fit(fit) == "none of the work can be done side by side: more requests at a time bring nothing"
