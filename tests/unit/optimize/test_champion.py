"""The champion: found where an earlier campaign left it, and what is said where it is not there."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimize import reporting
from optimize.champion import NONE_YET, judge_champion, record_of, with_champion
from optimize.config import CampaignConfig, ChampionConfig, PolicyConfig, SamplesConfig, SourceConfig
from optimize.plan import Observer, Plan, Workspace, plan, plan_id
from optimize.samples import load_samples
from registry import codec
from registry.errors import InputError
from registry.ledger import Ledger
from registry.records import Artifact, Campaign
from registry.store import FolderStore
from tests.doubles import campaigns

LIMITS = ("latency_p90_ms <= 105% rel vs champion", "rss_mb <= 600")


class Quiet(Observer):
    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def phase(self, name: str, total: int) -> None:
        pass

    def done(self, subject: str, outcome: str) -> None:
        self.lines.append((subject, outcome))

    def note(self, text: str) -> None:
        pass


def before(folder: Path, **changes: Any) -> Campaign:
    """A finished campaign's working folder."""
    folder.mkdir(parents=True)
    made = dataclasses.replace(campaigns.campaign(level="standard"), **changes)
    reporting.write_campaign(made, folder)
    return made


def planned(folder: Path, champion: Any, constraints: tuple[str, ...] = LIMITS) -> Plan:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(b"x")
    np.savez(folder / "samples.npz", image=np.zeros((3, 1, 4, 4), "f4"), labels=np.zeros(3, "i8"))
    config = CampaignConfig(
        name="digits",
        sources=(SourceConfig(onnx="model.onnx"),),
        samples=SamplesConfig(evaluation="samples.npz"),
        policy=PolicyConfig(constraints=constraints),
        champion=champion,
    )
    return plan(config, base=folder, work=folder / "burnish-work")


def test_the_selected_of_an_earlier_campaign_is_the_champion(tmp_path: Path) -> None:
    made = before(tmp_path / "before")
    found = with_champion(planned(tmp_path / "now", "../before")).champion
    assert found is not None
    assert found.candidate == campaigns.STATIC_TRITON
    assert found.variant == campaigns.STATIC
    assert found.source == made.sources[0]
    assert found.named == "../before"


def test_another_candidate_may_be_named(tmp_path: Path) -> None:
    before(tmp_path / "before")
    named = ChampionConfig(work="../before", candidate=campaigns.STATIC_MLSERVER.name)
    found = with_champion(planned(tmp_path / "now", named)).champion
    assert found is not None
    assert found.candidate == campaigns.STATIC_MLSERVER


def test_without_a_champion_the_plan_is_as_it_was(tmp_path: Path) -> None:
    made = planned(tmp_path / "now", None, ("rss_mb <= 600",))
    assert with_champion(made) is made
    assert record_of(made, None, None, ()) is None


@pytest.mark.parametrize(
    ("champion", "match"),
    [
        ("../nowhere", "champion: no finished campaign in"),
        (ChampionConfig(work="../before", candidate="int9"), "champion: this campaign has no candidate 'int9'"),
        ("burnish-work", "this campaign's own working folder"),
    ],
)
def test_a_champion_that_is_not_there_is_named(tmp_path: Path, champion: Any, match: str) -> None:
    before(tmp_path / "before")
    with pytest.raises(InputError, match=match):
        with_champion(planned(tmp_path / "now", champion))


def test_a_campaign_that_selected_nothing_has_no_champion(tmp_path: Path) -> None:
    before(tmp_path / "before", verdict=campaigns.no_winner())
    with pytest.raises(InputError, match="champion: this campaign selected no candidate"):
        with_champion(planned(tmp_path / "now", "../before"))


@pytest.mark.parametrize("wrong", ["models:/digits", "models:digits@champion", "models:/a/b/c"])
def test_a_registered_model_is_named_in_one_way(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(ValueError, match="models:/NAME@ALIAS"):
        planned(tmp_path / "now", wrong)


def test_in_the_first_campaign_limits_against_the_champion_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimize.champion._registered", lambda *_: None)
    found = with_champion(planned(tmp_path / "now", "models:/digits@champion"))
    assert found.champion is None
    assert found.passed_over == LIMITS[:1]
    assert [one.text for one in found.policy.constraints] == ["rss_mb <= 600"]
    recorded = record_of(found, None, None, ())
    assert recorded is not None
    assert (recorded.candidate_id, recorded.passed_over, recorded.notes) == (None, LIMITS[:1], (NONE_YET,))


def test_another_champion_makes_another_campaign(tmp_path: Path) -> None:
    before(tmp_path / "before")
    identities = set()
    for name in (campaigns.STATIC_MLSERVER.name, campaigns.STATIC_TRITON.name):
        named = ChampionConfig(work="../before", candidate=name)
        made = with_champion(planned(tmp_path / "now", named))
        same = dataclasses.replace(made, config=made.config.model_copy(update={"champion": "models:/digits@champion"}))
        identities.add(plan_id(same, sources=("s",), samples_digest="d"))
    assert len(identities) == 2


def test_a_champion_whose_files_are_gone_is_a_failure_with_the_reason(tmp_path: Path) -> None:
    before(tmp_path / "before")
    made = with_champion(planned(tmp_path / "now", "../before"))
    judged = judged_baseline(tmp_path, made)
    assert judged is not None
    assert judged.judged is None
    assert judged.failure is not None
    assert judged.failure.subject == "champion/int8-static"
    assert "are not there with the bytes of their record" in judged.failure.reason
    recorded = record_of(made, judged, None, ())
    assert recorded is not None
    assert recorded.was == campaigns.STATIC_TRITON.name
    assert "It could not be measured again" in recorded.notes[0]


def test_a_champion_with_other_bytes_than_its_record_is_not_taken(tmp_path: Path) -> None:
    before(tmp_path / "before")
    place = tmp_path / "before" / "artifacts" / campaigns.STATIC.artifact.digest
    place.mkdir(parents=True)
    (place / "model.onnx").write_bytes(b"another model")
    made = with_champion(planned(tmp_path / "now", "../before"))
    judged = judged_baseline(tmp_path, made)
    assert judged is not None
    assert judged.failure is not None


def judged_baseline(tmp_path: Path, made: Plan) -> Any:
    """What comes of judging the champion beside a baseline that needs no judging here."""
    from optimize.judging import Judged

    first = Judged(name="float32", variant=campaigns.FLOAT32, engine=campaigns.ORT, fidelities={}, answers={})
    work = tmp_path / "now" / "burnish-work"
    work.mkdir(parents=True, exist_ok=True)
    with Ledger.open(work / "ledger.jsonl") as ledger:
        workspace = Workspace(plan=made, store=FolderStore(work), ledger=ledger, observer=Quiet())
        evaluation = load_samples(tmp_path / "now" / "samples.npz")
        evaluation = dataclasses.replace(evaluation, inputs={"image": np.zeros((3, 1, 32, 32), "f4")})
        return judge_champion(workspace, evaluation=evaluation, sources=(), judged=[first])


def test_files_are_found_by_their_bytes_wherever_a_tracker_put_them(tmp_path: Path) -> None:
    from optimize import champion

    made = before(tmp_path / "before")
    moved = tmp_path / "fetched" / "model" / "data"
    moved.mkdir(parents=True)
    (moved / "model.onnx").write_bytes(b"bytes")
    [file] = campaigns.STATIC.artifact.files
    real = dataclasses.replace(file, sha256=codec.file_sha256(moved / "model.onnx"), size_bytes=5)
    artifact: Artifact = dataclasses.replace(campaigns.STATIC.artifact, files=(real,))
    standing = champion.Standing(
        named="models:/digits@champion",
        campaign=made,
        candidate=campaigns.STATIC_TRITON,
        variant=dataclasses.replace(campaigns.STATIC, artifact=artifact),
        source=made.sources[0],
        files=(tmp_path / "gone", tmp_path / "fetched"),
    )
    assert champion._place(standing) == {"model.onnx": moved / "model.onnx"}
