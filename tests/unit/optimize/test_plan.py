"""What is refused before any work begins."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from optimize.config import CampaignConfig
from optimize.plan import Plan, plan
from profiles.measure.resources import PackageEnergy
from registry.errors import InputError, PolicyError
from tests.doubles.models import mlp, write_onnx

LABELS = np.zeros(3, np.int64)


def planned(
    folder: Path,
    *constraints: str,
    objective: str = "maximize max_throughput_rps",
    labels: NDArray[np.int64] | None = LABELS,
    slices: NDArray[np.int64] | None = None,
    **fields: object,
) -> Plan:
    write_onnx(mlp(), folder)
    beside = {name: array for name, array in (("labels", labels), ("slices", slices)) if array is not None}
    np.savez(folder / "samples.npz", x=np.ones((3, 8), np.float32), **beside)
    given = {
        "name": "tiny",
        "sources": [{"onnx": "model.onnx"}],
        "samples": {"evaluation": "samples.npz"},
        "policy": {"constraints": constraints, "objective": objective},
    }
    return plan(CampaignConfig.model_validate(given | fields), base=folder, work=folder / "work")


@pytest.mark.parametrize("level", ["quick", "standard"])
def test_what_can_be_measured_is_taken(tmp_path: Path, level: str) -> None:
    lines = ["latency_p90_ms <= 50", "flip_rate <= 0.01", "cosine >= 0.9", "service_p50_ms <= 9"]
    assert len(planned(tmp_path, *lines, level=level).policy.constraints) == 4


def test_a_percentile_that_the_level_does_not_measure(tmp_path: Path) -> None:
    said = r"'latency_p99_ms <= 50 at 100 rps'.* quick measures p50 and p90 only"
    with pytest.raises(InputError, match=said) as caught:
        planned(tmp_path, "latency_p99_ms <= 50 at 100 rps", level="quick")
    assert caught.value.hint == "Use the level standard or proof."
    with pytest.raises(InputError, match="'minimize latency_p95_ms'"):
        planned(tmp_path, objective="minimize latency_p95_ms", level="quick")
    assert planned(tmp_path, "latency_p99_ms <= 50", objective="minimize latency_p95_ms", level="standard")


@pytest.mark.parametrize("metric", ["mse", "my_metric:score"])
def test_flips_of_a_metric_that_decides_nothing(tmp_path: Path, metric: str) -> None:
    with pytest.raises(InputError, match=rf"'flip_rate <= 0.01'.*'{metric}'") as caught:
        planned(tmp_path, "flip_rate <= 0.01", metric=metric)
    assert "accuracy_drop" in str(caught.value.hint)
    assert planned(tmp_path, "cosine >= 0.9", metric=metric)


def test_slices_that_the_samples_do_not_have(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'slice_drop_max <= 0.03'.* samples.npz names no slices") as caught:
        planned(tmp_path, "slice_drop_max <= 0.03")
    assert "'slices'" in str(caught.value.hint)
    assert planned(tmp_path, "slice_drop_max <= 0.03", slices=np.zeros(3, np.int64))


def test_a_limit_against_the_champion_needs_one_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the campaign file names no champion") as caught:
        planned(tmp_path, "rss_mb <= 100% rel vs champion")
    assert "models:/NAME@champion" in str(caught.value.hint)
    assert planned(tmp_path, "rss_mb <= 100% rel vs champion", champion="../before/burnish-work")
    assert planned(tmp_path, "rss_mb <= 100% rel vs baseline")


def test_labels_that_the_samples_do_not_have(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'accuracy' needs labels, and samples\.npz has none") as caught:
        planned(tmp_path, labels=None)
    assert "metric: cosine" in str(caught.value.hint)
    assert planned(tmp_path, labels=None, metric="cosine")
    assert planned(tmp_path, labels=None, metric="my_metric:score")


def test_the_machines_that_are_to_serve(tmp_path: Path) -> None:
    here = planned(tmp_path)
    assert here.target_instruction_sets == here.host.instruction_sets
    assert planned(tmp_path, target_instruction_sets=["avx2"]).target_instruction_sets == ("avx2",)
    with pytest.raises(ValueError, match=r"no instruction set 'avx512vnni'; did you mean 'avx512_vnni'\?"):
        planned(tmp_path, target_instruction_sets=["avx512vnni"])


def test_a_metric_that_is_misspelt(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'acuracy'"):
        planned(tmp_path, metric="acuracy")


PRICED = {
    "name": "mine",
    "cores": 4,
    "price_per_hour": 0.36,
    "currency": "EUR",
    "price_source": "a contract",
    "price_date": "2026-01-31",
}


def test_a_cost_needs_a_price(tmp_path: Path) -> None:
    line = "cost_per_million <= 2"
    with pytest.raises(PolicyError, match="nothing says what the machine costs"):
        planned(tmp_path, line)
    with pytest.raises(PolicyError, match="nothing says what the machine costs"):
        planned(tmp_path, line, hardware="cpu-2")
    found = planned(tmp_path, line, hardware=PRICED).hardware
    assert found is not None
    assert (found.price_per_hour, found.price_date) == (0.36, "2026-01-31")
    assert planned(tmp_path).hardware is None


def test_hardware_of_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no hardware profile 'cpu-3'"):
        planned(tmp_path, hardware="cpu-3")


def test_a_limit_on_what_happens_once_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="one value has no upper end"):
        planned(tmp_path, "first_request_ms <= 100")
    assert planned(tmp_path, objective="minimize first_request_ms").policy.objectives


def test_energy_is_refused_where_it_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackageEnergy, "read", lambda self: None)
    with pytest.raises(PolicyError, match="energy of the CPU cannot be read here"):
        planned(tmp_path, "cpu_joules_per_1k <= 2")


def test_gpu_metrics_are_refused_where_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profiles.measure.host._gpus", lambda: ())
    with pytest.raises(PolicyError, match="no GPU here"):
        planned(tmp_path, "gpu_memory_mb <= 2000")


def test_the_highest_rate_needs_a_latency_limit_that_can_be_missed(tmp_path: Path) -> None:
    goal = {"objective": "maximize slo_max_rps", "level": "quick"}
    with pytest.raises(PolicyError, match="the policy has none"):
        planned(tmp_path, "cosine >= 0.9", **goal)
    with pytest.raises(PolicyError, match="gives requests up after 5 s"):
        planned(tmp_path, "latency_p90_ms <= 5000", **goal)
    assert planned(tmp_path, "latency_p90_ms <= 50", **goal)
