"""The way back from a promotion, how things stand in between, and who was the champion when."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from optimize import reporting
from optimize.cluster_config import ClusterConfig, load_cluster
from optimize.production import Place, open_pipeline_place, open_place
from registry import promotion as promotions
from registry.errors import InputError
from registry.ledger import Ledger
from registry.promotion import CHAMPION, Journal, Promoter
from registry.records import Promotion, Reign
from registry.tracking import store_uri

if TYPE_CHECKING:
    from registry.mlflow_registry import MlflowRegistry

JOURNAL = "promotions.jsonl"
"""The file of a working folder that has all that was promoted from it, and taken back."""
Told = Callable[[str], None]


def roll_back(work: Path, *, cluster: Path | None, campaign_file: Path | None, reason: str, told: Told) -> Promotion:
    """Takes the last promotion of a working folder back, and returns it.

    Args:
        work: the working folder.
        cluster: a file with a section ``cluster:``; None for this machine, or the campaign file's.
        campaign_file: names the cluster, where ``cluster`` does not.
        reason: why, for the history.
        told: hears what is done.

    Raises:
        InputError: there is nothing to roll back, the cluster is another one, or somebody has changed what was done.
        UnreachableError: the registry or the cluster does not answer.
    """
    config, base = load_cluster(cluster), work if cluster is None else cluster.resolve().parent
    if campaign_file is not None and cluster is None:
        from optimize.config import load_campaign

        config, base = load_campaign(campaign_file).cluster, campaign_file.resolve().parent
    if not (work / JOURNAL).is_file():
        raise InputError(f"nothing was promoted from {work}", hint="Name the working folder of a campaign.")
    registry = open_registry(work)
    registry.check()
    with Ledger.open(work / JOURNAL) as ledger:
        journal = Journal(ledger, now)
        last = journal.undoable()
        if last is None:
            raise InputError(f"all that was promoted from {work} was rolled back already")
        with place_of(last, config, base=base, work=work) as place:
            promoter = Promoter(registry=registry, rollout=place.rollout, probe=None, journal=journal, told=told)
            promoter.roll_back(last, reason=reason)
    return last


@contextmanager
def place_of(last: Promotion, config: ClusterConfig, *, base: Path, work: Path) -> Iterator[Place]:
    """Where a promotion was, to take it back.

    Raises:
        InputError: it was elsewhere.
    """
    if last.resource == "pipeline":
        opened = open_pipeline_place(config, base=base, work=work, production=last.production)
    else:
        opened = open_place(config, base=base, work=work, production=last.production, served=None, serve=False)
    with opened as place:
        _check_location(last, place)
        yield place


def _check_location(last: Promotion, place: Place) -> None:
    if last.location != place.rollout.location:
        raise InputError(
            f"{last.candidate_name} was promoted at {last.location}, not at {place.rollout.location}",
            hint="Name the same cluster with --cluster or --campaign.",
        )


def after_interruption(work: Path, back: str) -> tuple[str, str]:
    """How things stand once a promotion, or the way back from one, was interrupted; and what goes on or back.

    Args:
        work: the working folder.
        back: the command that takes the promotion back.
    """
    journal = read_journal(work)
    last = journal.promotions[-1] if journal is not None and journal.promotions else None
    if journal is None or last is None:
        return "Nothing was changed.", "The same command begins anew."
    name, state = last.candidate_name, journal.state(last)
    old = "no version" if last.champion is None else f"version {last.champion}"
    if state in {"new", "rolled back"}:
        return f"All is as it was before {name}: {old} is the champion.", "The same command begins anew."
    if state == "rolling back":
        return f"{name} is not taken back whole yet.", f"`{back}` completes it."
    done = journal.done(last)
    if state == "completed":
        return f"{name} is the champion of {last.model}, and nothing is under way.", f"Back to what was: `{back}`."
    if CHAMPION in done:
        left = f"{last.experiment} and {last.challenger} are left to be taken away"
        return f"{name} is the champion already; {left}.", f"The same command does it; `{back}` goes back."
    at = next((step.name for step in last.steps if step.name not in done), promotions.WHOLE)
    return (
        f"The promotion of {name} stands at {at}; {old} is the champion.",
        f"The same command goes on there; `{back}` goes back.",
    )


def open_registry(work: Path) -> "MlflowRegistry":
    """The registry of a working folder's campaign, not connected yet."""
    # MLflow takes seconds to import.
    from registry.mlflow_registry import MlflowRegistry

    return MlflowRegistry(store_uri(reporting.named_store(work), work), work)


def history(model: str, work: Path) -> tuple[tuple[Reign, ...], str]:
    """Who was the champion when; see `registry.promotion.history`.

    Raises:
        InputError: there is no such registered model, or no store.
        UnreachableError: the registry does not answer.
    """
    if not (reporting.named_store(work) or os.environ.get("MLFLOW_TRACKING_URI") or (work / "mlflow.db").is_file()):
        raise InputError(
            f"there is no tracking store in {work}", hint="Name the working folder with --work, or MLFLOW_TRACKING_URI."
        )
    registry = open_registry(work)
    registry.check()
    return promotions.history(model, registry)


def read_journal(work: Path) -> Journal | None:
    """What became of the promotions of a working folder, for questions only; None where nothing was promoted."""
    path = work / JOURNAL
    return Journal(Ledger.read(path), now) if path.is_file() else None


def now() -> str:
    """The time, in ISO 8601, UTC, to the microsecond."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
