"""What campaigns on several hosts chose, side by side."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from optimize.across_hosts import names_campaign, side_by_side
from optimize.cli import main
from optimize.comparing import kind_of
from optimize.reporting import write_campaign
from registry.errors import InputError
from registry.records import Campaign, Constraint, Estimate, HardwareProfile, Measurement
from tests.doubles.campaigns import campaign

GPU = HardwareProfile(
    name="one GPU", cores=8, gpus=1, price_per_hour=1.2, currency="EUR", price_source="a contract",
    price_date="2026-01-31",
)  # fmt: skip


def metric(value: float, unit: str) -> Estimate:
    return Estimate(value=value, low=0.9 * value, high=1.1 * value, runs=3, method="t over runs", unit=unit)


def costed(made: Campaign, name: str, cost: float, joules: str) -> Campaign:
    """The campaign under another name, whose winner's cost and energy are known."""
    known = {"cost_per_million": metric(cost, "EUR"), joules: metric(40.0, "J")}
    more = Measurement(candidate_id=str(made.verdict.selected), load=None, metrics=known, invalid_runs=0)
    limit = Constraint(text="cost_per_million <= 2.50", metric="cost_per_million", op="<=", limit=2.5)
    policy = replace(made.verdict.policy, constraints=(*made.verdict.policy.constraints, limit))
    return replace(
        made, id=name, name=name, measurements=(*made.measurements, more), verdict=replace(made.verdict, policy=policy)
    )


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    made = campaign(level="standard")
    on_cpu = costed(made, "cpu", 2.0, "cpu_joules_per_1k")
    on_gpu = replace(
        costed(made, "gpu", 3.0, "gpu_joules_per_1k"),
        host=replace(made.host, fingerprint="gpu-host", gpus=("NVIDIA L4",)),
        hardware=GPU,
    )
    for one in (on_cpu, on_gpu):
        (tmp_path / one.name).mkdir()
        write_campaign(one, tmp_path / one.name)
    return str(tmp_path / "cpu"), str(tmp_path / "gpu")


def test_unlike_hosts_stand_side_by_side_on_the_same_limits(folders: tuple[str, str]) -> None:
    found = side_by_side(folders)
    assert found.unlike
    assert found.sentence.startswith("2 campaigns on 2 unlike hosts: no ratios.")
    place = [one.text for one in found.limits].index("cost_per_million <= 2.50")
    assert [one.judgements[place].outcome for one in found.columns] == ["pass", "fail"]
    assert all(not one.relative for one in found.limits)
    assert len({one.text for one in found.limits}) == len(found.limits)
    assert found.columns[1].host.endswith("NVIDIA L4")
    assert any(note.startswith("Joules of one part") for note in found.notes)


def test_a_candidate_is_named_in_its_folder(folders: tuple[str, str]) -> None:
    cpu, gpu = folders
    name = "float32 @ mlserver-grpc-b8-d2"
    found = side_by_side([f"{cpu}:{name}", cpu, gpu])
    assert [one.candidate.name == name for one in found.columns] == [True, False, False]
    assert [one.selected for one in found.columns] == [False, True, True]
    assert len({one.fingerprint for one in found.columns}) == 2
    same = side_by_side([f"{cpu}:{name}", cpu])
    assert not same.unlike
    assert "on one host, not measured in turns" in same.sentence


def test_words_that_name_no_campaign(folders: tuple[str, str], tmp_path: Path) -> None:
    cpu, gpu = folders
    assert names_campaign(cpu)
    assert names_campaign(f"{gpu}:float32")
    assert not names_campaign(str(tmp_path))
    assert not names_campaign("127.0.0.1:8001/m")
    with pytest.raises(InputError, match="named twice"):
        side_by_side([cpu, cpu])
    with pytest.raises(InputError, match="no candidate 'int9'"):
        side_by_side([cpu, f"{gpu}:int9"])
    with pytest.raises(InputError, match="names no campaign"):
        side_by_side([cpu, str(tmp_path)])
    with pytest.raises(InputError, match="two kinds"):
        kind_of(cpu, "127.0.0.1:8001/m")
    with pytest.raises(InputError, match="in pairs"):
        kind_of("float32", "int8", "int4")


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["burnish", "compare", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_command_tells_people_and_scripts(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert command(monkeypatch, *folders) == 0
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "cost_per_million <= 2.50" in shown
    assert "one GPU: 1.2 EUR an hour (a contract, 2026-01-31)" in shown
    assert "energy of the GPU" in shown
    assert command(monkeypatch, *folders, f"{folders[0]}:float32 @ mlserver-grpc-b8-d2", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "campaigns"
    assert told["unlike_hosts"]
    assert len(told["columns"]) == 3
    assert {"limit", "outcome", "reason"} == set(told["columns"][0]["limits"][0])
    assert command(monkeypatch, *folders, "--rate", "5") == 2
