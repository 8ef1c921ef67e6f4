"""The champion of a real MLflow registry: found by its alias, with its campaign's record and its model's files."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from optimize.champion import PREFIX, _place, with_champion
from optimize.config import CampaignConfig, RegistryConfig, SamplesConfig, SourceConfig
from optimize.plan import Plan, plan
from registry import codec
from registry.errors import InputError
from registry.mlflow_champion import find_registered
from registry.mlflow_tracking import MlflowTracker
from registry.records import Campaign
from registry.tracking import embedded_uri
from tests.doubles import campaigns

pytestmark = [
    pytest.mark.slow,
    # MLflow's own queries use an option of SQLAlchemy that is on its way out.
    pytest.mark.filterwarnings("ignore:.*noload.*:DeprecationWarning"),
]


@pytest.fixture
def uri(work: Path) -> str:
    return embedded_uri(work)


@pytest.fixture
def champion(uri: str, work: Path, own_name: Campaign) -> str:
    """The registered model whose version 1 is the champion."""
    published = MlflowTracker(uri, work).publish(own_name, files={})
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.set_registered_model_alias(own_name.model_name, "champion", published.model_version)
    return own_name.model_name


def planned(folder: Path, named: str, uri: str) -> Plan:
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"x")
    np.savez(folder / "samples.npz", x=np.zeros((3, 4), "f4"), labels=np.zeros(3, "i8"))
    config = CampaignConfig(
        name="digits",
        sources=(SourceConfig(onnx="model.onnx"),),
        samples=SamplesConfig(evaluation="samples.npz"),
        registry=RegistryConfig(tracking_uri=uri),
        champion=named,
    )
    made = plan(config, base=folder, work=folder / "burnish-work")
    made.work.mkdir()
    return made


def test_an_alias_leads_to_the_candidate_and_its_files(
    champion: str, uri: str, own_name: Campaign, tmp_path: Path
) -> None:
    found = with_champion(planned(tmp_path / "now", f"models:/{champion}@champion", uri)).champion
    assert found is not None
    assert found.candidate == campaigns.STATIC_TRITON
    assert found.campaign == dataclasses.replace(own_name, artifacts=found.campaign.artifacts)
    assert found.named == f"models:/{champion}@champion, version 1"
    place = _place(found)
    assert place is not None
    assert set(place) == {"model.onnx", "weights.bin"}
    # They were on this machine, so that nothing was downloaded.
    assert not (tmp_path / "now" / "burnish-work" / PREFIX).exists()


def test_files_that_are_not_here_are_fetched_from_the_registry(
    uri: str, work: Path, own_name: Campaign, tmp_path: Path
) -> None:
    elsewhere = {}
    for variant_id, folder in own_name.artifacts.items():
        elsewhere[variant_id] = str(tmp_path / "elsewhere" / variant_id)
        shutil.copytree(folder, elsewhere[variant_id])
    made = dataclasses.replace(own_name, artifacts=elsewhere)
    MlflowTracker(uri, work).publish(made, files={})
    shutil.rmtree(tmp_path / "elsewhere")
    for number in range(2):
        folder = tmp_path / f"now-{number}"
        found = with_champion(planned(folder, f"models:/{own_name.model_name}/1", uri)).champion
        assert found is not None
        place = _place(found)
        assert place is not None
        assert all(path.is_relative_to(folder / "burnish-work" / PREFIX) for path in place.values())
        [variant] = [one for one in own_name.variants if one.id == found.variant.id]
        assert {path: codec.file_sha256(one) for path, one in place.items()} == {
            one.path: one.sha256 for one in variant.artifact.files
        }


def test_where_nothing_has_the_alias_there_is_no_champion_yet(uri: str, work: Path, tmp_path: Path) -> None:
    assert find_registered(uri, work, tmp_path, name="nothing", alias="champion", version=None) is None


def test_a_model_without_the_alias_has_no_champion_yet(champion: str, uri: str, work: Path, tmp_path: Path) -> None:
    assert find_registered(uri, work, tmp_path, name=champion, alias="production", version=None) is None


def test_a_version_that_is_not_there_is_named(champion: str, uri: str, work: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{champion} has no version 9"):
        find_registered(uri, work, tmp_path, name=champion, alias=None, version="9")


def test_a_version_that_others_registered_is_refused(uri: str, work: Path, tmp_path: Path) -> None:
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.create_registered_model("theirs")
    client.create_model_version("theirs", source=(tmp_path / "model").as_uri())
    client.set_registered_model_alias("theirs", "champion", "1")
    with pytest.raises(InputError, match="version 1 of theirs was not registered by burnish"):
        find_registered(uri, work, tmp_path, name="theirs", alias="champion", version=None)
