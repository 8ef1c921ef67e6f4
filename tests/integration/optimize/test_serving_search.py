"""The search for a serving profile on real MLServers."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from optimize.campaign import judge_campaign
from optimize.cli.output import LineObserver
from optimize.config import CampaignConfig
from optimize.judging import Judged
from optimize.plan import Workspace, plan
from optimize.serving_search import Found, find_profiles
from profiles.deploy.local import LocalCluster
from registry.codec import digest, to_jsonable
from registry.ledger import Ledger
from registry.records import Candidate, ServingProfile
from registry.store import FolderStore
from tests.doubles.busy import undisturbed
from tests.doubles.models import FEATURES, mlp, mlp_answer, write_onnx

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # campaigns wait for each other's cores


def candidate_of(one: Judged, profile: ServingProfile) -> Candidate:
    return Candidate(
        id=digest([one.name, to_jsonable(profile)]),
        name=f"{one.name} @ {profile.key}",
        variant_id=one.variant.id,
        variant_name=one.name,
        engine=one.engine,
        engine_version="1",
        serving=profile,
        server_version="1",
    )


def test_profiles_are_served_and_measured_one_after_the_other(tmp_path: Path) -> None:
    write_onnx(mlp(), tmp_path)
    x = np.random.default_rng(1).normal(size=(100, FEATURES)).astype(np.float32)
    np.savez(tmp_path / "evaluation.npz", x=x, labels=mlp_answer(x).argmax(axis=1))
    axes = {"points": 2, "batch_sizes": [1, 16], "delays_ms": [2], "protocols": ["grpc"], "lanes": [0], "threads": [1]}
    config = CampaignConfig.model_validate(
        {
            "name": "tiny",
            "sources": [{"onnx": "model.onnx"}],
            "samples": {"evaluation": "evaluation.npz"},
            "variants": ["float32"],
            "serving": [{"server": "mlserver", "max_batch_size": 16, "max_batch_delay_ms": 2}],
            "search": {"serving": axes},
            "level": "quick",
        }
    )
    work, observer = tmp_path / "work", LineObserver()
    prepared = judge_campaign(config, base=tmp_path, work=work, observer=observer)
    planned = plan(config, base=tmp_path, work=work)
    numbers = itertools.count()

    def searched() -> Found:
        """What a search finds of which nothing is known yet."""
        with (
            Ledger.open(work / f"search-{next(numbers)}.jsonl") as ledger,
            LocalCluster(work, server_cpus=planned.server_cpus) as cluster,
        ):
            workspace = Workspace(plan=planned, store=FolderStore(work), ledger=ledger, observer=observer)
            return find_profiles(workspace, prepared.judged, cluster, prepared.evaluation, candidate_of)

    found = undisturbed(searched, lambda found: all(point.score for one in found.searches for point in one.points))
    [search] = found.searches
    assert [point.profile.max_batch_size for point in search.points] == [16, 1]
    assert all(point.score is not None for point in search.points)
    assert found.workspace.plan.profiles[0] == search.points[0].profile
    assert search.best in search.points
