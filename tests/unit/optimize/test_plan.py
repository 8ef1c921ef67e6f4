"""What is refused before any work begins."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from optimize.config import CampaignConfig, ResourcesConfig
from optimize.plan import Plan, plan, plan_id
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


# --- where it is measured --------------------------------------------------------------------------------------------


def elsewhere(folder: Path, **fields: object) -> Plan:
    return plan(planned(folder, **fields).config, base=folder, work=folder / "work", engine="ray")


def test_on_a_cluster_a_node_measures(tmp_path: Path) -> None:
    assert not planned(tmp_path).elsewhere
    made = elsewhere(tmp_path)
    assert made.elsewhere
    assert made.stays is None


def test_what_needs_code_of_the_users_or_a_core_2_is_measured_here(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def score(outputs, labels): return 1.0\n")
    made = elsewhere(tmp_path, metric="own:score")
    assert not made.elsewhere
    assert "own:score is code of yours" in str(made.stays)
    core2 = {"kind": "scheduler", "address": "localhost:9004", "mesh": "localhost:9000", "storage": "/srv/models"}
    made = elsewhere(tmp_path, cluster={**core2, "servers": {"mlserver": "mlserver", "triton": "triton"}})
    assert "served by a Core 2" in str(made.stays)


def test_where_it_is_measured_makes_no_other_campaign_of_it(tmp_path: Path) -> None:
    one, other = planned(tmp_path), planned(tmp_path, resources={"cores": 1})
    ids = {plan_id(made, sources=("s",), samples_digest="d") for made in (one, other)}
    assert len(ids) == 1


def test_gpus_of_a_node_are_not_looked_for_here(tmp_path: Path) -> None:
    made = planned(tmp_path)
    policy = made.config.policy.model_copy(update={"constraints": ("gpu_memory_mb <= 100",)})
    config = made.config.model_copy(update={"policy": policy, "resources": ResourcesConfig(gpus=1)})
    assert plan(config, base=tmp_path, work=tmp_path / "work", engine="ray").elsewhere
    if not made.host.gpus:
        with pytest.raises(PolicyError, match="there is no GPU here to measure"):
            plan(config, base=tmp_path, work=tmp_path / "work")


def test_samples_that_judge_and_calibrate_are_remarked_on(tmp_path: Path) -> None:
    both = {"evaluation": "samples.npz", "calibration": "../here/samples.npz"}
    (tmp_path / "here").mkdir()
    (remark,) = planned(tmp_path / "here", samples=both).remarks
    assert remark.startswith("samples.calibration is the file that judges, too")
    assert planned(tmp_path).remarks == ()
