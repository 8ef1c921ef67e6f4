"""The champion: what serves now, found where an earlier campaign left it, and measured again beside the others."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from optimize.config import REGISTERED, ChampionConfig
from optimize.judging import Judged, failure_of, judge_one, told_of
from optimize.plan import Plan, Standing, Workspace
from optimize.rendering import find_candidate
from optimize.reporting import read_campaign
from optimize.samples import Samples, check_fit
from registry import codec
from registry.errors import BurnishError, InputError, StorageError
from registry.records import Artifact, Campaign, Candidate, Champion, Comparison, Failure, Source
from registry.shared_store import share
from registry.tracking import store_uri

PREFIX = "champion"
"""Begins the name of a champion's variant and source, where this campaign has none of the same content."""
NONE_YET = "There is no champion yet."


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """The champion as a variant of this campaign.

    Attributes:
        judged: how it answers now; None where it could not be had or judged.
        source: to be told of beside the campaign's own; None where it is one of them.
        failure: why it is not judged.
        notes: what differs from how it was measured then.
    """

    judged: Judged | None
    source: Source | None = None
    failure: Failure | None = None
    notes: tuple[str, ...] = ()


def with_champion(planned: Plan) -> Plan:
    """The plan with the champion that its campaign file names; without the limits against it where there is none yet.

    Raises:
        InputError: what the file names is not there, or is not burnish's.
        UnreachableError: the tracking store does not answer.
    """
    named = planned.config.champion
    if named is None:
        return planned
    standing = _find(planned, named)
    if standing is not None:
        return replace(planned, champion=standing)
    held = [one for one in planned.policy.constraints if one.reference == "champion"]
    kept = tuple(one for one in planned.policy.constraints if one.reference != "champion")
    return replace(
        planned, policy=replace(planned.policy, constraints=kept), passed_over=tuple(one.text for one in held)
    )


def judge_champion(
    workspace: Workspace,
    *,
    evaluation: Samples,
    sources: Sequence[Source],
    judged: Sequence[Judged],
) -> Contender | None:
    """How the champion answers now, in this campaign's engines and on its samples; None where there is none.

    Args:
        workspace: the plan, and where results go.
        evaluation: the samples.
        sources: of this campaign.
        judged: its variants; the first is the baseline.

    Raises:
        StorageError: the working folder cannot be written.
    """
    standing = workspace.plan.champion
    if standing is None:
        return None
    workspace.observer.phase("Judging the champion", 1)
    baseline, candidate = judged[0], standing.candidate
    own = next((one for one in sources if one.digest == standing.source.digest), None)
    known = next(
        (one for one in judged if (one.variant.id, one.engine) == (candidate.variant_id, candidate.engine)), None
    )
    source = None if own is not None else replace(standing.source, name=PREFIX)
    name = f"{PREFIX}/{candidate.variant_name.removeprefix(f'{PREFIX}/')}"
    variant = replace(standing.variant, name=name, source=PREFIX if own is None else own.name)
    # It is served its own way, whatever the others' profiles are.
    served_so = replace(workspace, plan=replace(workspace.plan, profiles=(candidate.serving,)))
    try:
        if known is not None and not known.variant.batch_dependent and len(known.fidelities) == 1:
            found = known
        else:
            if known is not None:
                variant = known.variant
            else:
                check_fit(evaluation.inputs, standing.source.artifact.inputs, where="the evaluation samples")
                _store(workspace, variant.artifact, standing)
            found = judge_one(served_so, variant, candidate.engine, evaluation, baseline)
            found = replace(found, name=found.name if known is None else known.name)
    except StorageError:
        raise
    except BurnishError as error:
        failure = failure_of(name, "fidelity", error)
        workspace.observer.done(name, told_of(failure))
        return Contender(judged=None, failure=failure, notes=(f"It could not be measured again: {failure.reason}",))
    workspace.observer.done(found.name, "is measured again in the same rounds")
    return Contender(judged=found, source=source, notes=_notes(standing))


def share_champion(workspace: Workspace) -> None:
    """Puts the champion's files where other machines find them; that they are nowhere is said when it is judged."""
    standing = workspace.plan.champion
    if standing is not None:
        with suppress(InputError):
            _store(workspace, standing.variant.artifact, standing)
            share(workspace.store, standing.variant.artifact)


def record_of(
    planned: Plan, contender: Contender | None, candidate: Candidate | None, comparisons: Sequence[Comparison]
) -> Champion | None:
    """What the campaign records of the champion; None where its file names none.

    Args:
        planned: the plan.
        contender: the champion in this campaign; None where there is none yet.
        candidate: that was measured; None where it was not.
        comparisons: of the others with it.
    """
    named = planned.config.champion
    if named is None:
        return None
    standing = planned.champion
    if standing is None or contender is None:
        return Champion(named=_words(named), candidate_id=None, passed_over=planned.passed_over, notes=(NONE_YET,))
    return Champion(
        named=standing.named,
        candidate_id=None if candidate is None else candidate.id,
        was=standing.candidate.name,
        campaign_id=standing.campaign.id,
        comparisons=tuple(comparisons),
        notes=(
            *contender.notes,
            *(() if candidate is None else _versions(standing.candidate, candidate)),
        ),
    )


def _find(planned: Plan, named: str | ChampionConfig) -> Standing | None:
    if isinstance(named, str) and (found := REGISTERED.fullmatch(named)) is not None:
        return _registered(planned, named, found["name"], found["alias"], found["version"])
    given = ChampionConfig(work=named) if isinstance(named, str) else named
    work = planned.path(given.work)
    if work == planned.work:
        raise InputError(
            f"champion: {work} is this campaign's own working folder, whose winner it is about to replace",
            hint="Name the folder of the campaign that chose what serves now, or give this one another --work.",
        )
    try:
        campaign = read_campaign(work)
        candidate = find_candidate(campaign, given.candidate)
    except InputError as error:
        raise InputError(f"champion: {error.message}", hint=error.hint) from error
    return _standing(_words(named), campaign, candidate, (work,))


def _registered(planned: Plan, uri: str, name: str, alias: str | None, version: str | None) -> Standing | None:
    from registry.mlflow_champion import fetch_model, find_registered

    store = store_uri(planned.config.registry.tracking_uri, planned.work)
    with tempfile.TemporaryDirectory(prefix="burnish-champion-") as scratch:
        found = find_registered(store, planned.work, Path(scratch), name=name, alias=alias, version=version)
    if found is None:
        return None
    campaign = codec.loads(found.campaign)
    if not isinstance(campaign, Campaign):
        raise InputError(f"champion: {uri}: its record is no campaign")
    candidate = find_candidate(campaign, found.candidate_id)
    standing = _standing(f"{uri}, version {found.version}", campaign, candidate, ())
    if _place(standing) is not None:
        return standing
    # What MLflow keeps is fetched once for each version.
    fetched = planned.work / PREFIX / f"{name}-{found.version}"
    if not fetched.is_dir():
        fetched.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=fetched.parent) as scratch:
            place = fetch_model(store, Path(scratch), name=name, version=found.version)
            shutil.copytree(place, Path(scratch) / "whole" / "model")
            (Path(scratch) / "whole").replace(fetched)
    return replace(standing, files=(*standing.files, fetched))


def _standing(named: str, campaign: Campaign, candidate: Candidate, works: tuple[Path, ...]) -> Standing:
    variant = next((one for one in campaign.variants if one.id == candidate.variant_id), None)
    source = None if variant is None else next((one for one in campaign.sources if one.name == variant.source), None)
    if variant is None or source is None:
        raise InputError(f"champion: the record of {campaign.name} does not hold the variant {candidate.variant_name}")
    folders = [Path(campaign.artifacts[variant.id])] if variant.id in campaign.artifacts else []
    folders += [work / "artifacts" / variant.artifact.digest for work in works]
    return Standing(
        named=named,
        campaign=campaign,
        candidate=candidate,
        variant=variant,
        source=source,
        files=tuple(folders),
    )


def _store(workspace: Workspace, artifact: Artifact, standing: Standing) -> None:
    """Puts the champion's files into this campaign's store, each of them with the bytes that its record says.

    Raises:
        InputError: they are nowhere.
    """
    if artifact.digest in workspace.store:
        return
    place = _place(standing)
    if place is None:
        looked = ", ".join(str(folder) for folder in standing.files) or "no folder of this machine"
        raise InputError(
            f"the files of {standing.variant.name} are not there with the bytes of their record (looked in: {looked})",
            hint="Run the campaign that chose it once more, or name another champion.",
        )
    with tempfile.TemporaryDirectory(prefix="champion-", dir=workspace.folder("tmp")) as scratch:
        for path, found in place.items():
            target = Path(scratch) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, target)
        workspace.store.add(
            Path(scratch),
            format=artifact.format,
            entry=artifact.entry,
            inputs=artifact.inputs,
            outputs=artifact.outputs,
        )


def _place(standing: Standing) -> dict[str, Path] | None:
    """Path in the artifact -> file with those very bytes, all of one folder; None where no folder has them all."""
    for folder in standing.files:
        found = {
            file.path: next((one for one in _called(folder, file.path) if codec.file_sha256(one) == file.sha256), None)
            for file in standing.variant.artifact.files
        }
        if all(found.values()):
            return {path: one for path, one in found.items() if one is not None}
    return None


def _called(folder: Path, path: str) -> Iterator[Path]:
    """Files below a folder that may be the one of this path: there, or by its name anywhere, as trackers move them."""
    if (folder / path).is_file():
        yield folder / path
    if folder.is_dir():
        yield from (one for one in sorted(folder.rglob(Path(path).name)) if one.is_file())


def _notes(standing: Standing) -> tuple[str, ...]:
    return (f"It was chosen by the campaign {standing.campaign.name} of {standing.campaign.started_at}.",)


def _versions(was: Candidate, now: Candidate) -> tuple[str, ...]:
    """What serves it now, where that is not what served it then."""
    pairs = (
        (was.engine.name, was.engine_version, now.engine_version),
        (was.serving.server, was.server_version, now.server_version),
    )
    return tuple(
        f"It was chosen with {what} {then}, and is measured with {here}." for what, then, here in pairs if then != here
    )


def _words(named: str | ChampionConfig) -> str:
    if isinstance(named, str):
        return named
    return named.work if named.candidate is None else f"{named.candidate} of {named.work}"
