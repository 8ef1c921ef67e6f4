"""A campaign's runs in MLflow: its own, one for each candidate and one for each search, written in few calls."""

# First, as it sets how MLflow is imported.
from registry.mlflow_store import each  # isort: split

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from mlflow import MlflowClient
from mlflow.data.schema import TensorDatasetSchema
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Metric, Param, Run
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID

from registry import codec, tracked, tracked_metrics
from registry.mlflow_models import ModelKey, inside, log_models, model_key, schema_of, scratch_folder
from registry.mlflow_sending import is_anothers, may_be_sending
from registry.records import Campaign, Candidate, ServingSearch
from registry.report.markdown import render_markdown
from registry.report.table import variant_of

# MLflow's own limits on one log_batch.
MOST_METRICS = 1000
MOST_PARAMS = 100
# MLflow takes 36; all of it is in the parameters.
_DATASET_DIGEST_CHARS = 16
_FINISHED, _FAILED = "FINISHED", "FAILED"
_CURVES = (
    tracked_metrics.curves,
    tracked_metrics.spectrum_curves,
    tracked_metrics.round_curves,
    tracked_metrics.system_metrics,
)
TABLES = ("failures.json", "curves.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """The runs of a campaign.

    Attributes:
        parent: id of its own run.
        candidates: candidate id -> run id.
        models: candidate id -> id of the logged model that it serves.
    """

    parent: str
    candidates: Mapping[str, str]
    models: Mapping[str, str]


def recorded(
    campaign: Campaign, runs: Sequence[Run], content: str, *, sender: str
) -> tuple[Recorded | None, list[str]]:
    """What of the runs is the whole campaign as it is now, and the ids of those that are left of other tries.

    Of several that are whole the first that ended counts, for whoever looks. What another folder may still be sending,
    or has sent later with another content, is none of the others.

    Args:
        campaign: to look for.
        runs: all that bear its id.
        content: digest of what it found.
        sender: who looks, see `registry.mlflow_sending`.
    """
    parents = {run.info.run_id: run for run in runs if _kind(run) == "campaign"}
    same = [run for run in parents.values() if run.info.status == _FINISHED and _content(run) == content]
    for parent in sorted(same, key=_ended_at):
        family = [run for run in runs if _parent(run) == parent.info.run_id and _ended(run)]
        searches = {run.data.tags.get("burnish.search"): run for run in family if _kind(run) == "search"}
        children = {str(run.data.tags.get("burnish.candidate_id")): run for run in family if _kind(run) != "search"}
        candidates = {one.id for one in campaign.candidates}
        if candidates <= set(children) and len(searches) == len(campaign.serving_searches):
            break
    else:
        return None, [run.info.run_id for run in runs]

    def is_left(run: Run) -> bool:
        first = parents.get(_parent(run) or run.info.run_id)
        if first is None or not is_anothers(first.data.tags, sender):
            return True
        if not _ended(first):
            return not may_be_sending(first.data.tags, sender)
        return _content(first) == content or _ended_at(first) < _ended_at(parent)

    kept = {run.info.run_id for run in (parent, *children.values(), *searches.values())}
    found = Recorded(
        parent=parent.info.run_id,
        candidates={candidate_id: run.info.run_id for candidate_id, run in children.items()},
        models={
            candidate_id: model_id
            for candidate_id, run in children.items()
            if (model_id := run.data.tags.get("burnish.logged_model"))
        },
    )
    return found, [run.info.run_id for run in runs if run.info.run_id not in kept and is_left(run)]


def record(
    client: MlflowClient,
    campaign: Campaign,
    *,
    experiment_id: str,
    content: str,
    files: Mapping[str, Path],
    at_once: int,
    sender: Mapping[str, str],
) -> None:
    """Writes all runs, the parent's end last: one that has not ended is what is left of an interrupted try.

    Args:
        client: of the tracking store.
        campaign: to write.
        experiment_id: where.
        content: digest of what it found.
        files: name -> local file to keep with the campaign.
        at_once: how many runs are written at a time.
        sender: tags of who writes, see `registry.mlflow_sending.sender_tags`.
    """
    writer = _Writer(client, campaign, experiment_id, at_once, sender)
    parent = writer.begin(content, files)
    models = log_models(client, campaign, experiment_id=experiment_id, run_id=parent, at_once=at_once, sender=sender)
    each(lambda one: writer.candidate(one, parent, models), campaign.candidates, at_once=at_once)
    each(lambda numbered: writer.search(*numbered, parent), enumerate(campaign.serving_searches), at_once=at_once)
    client.set_terminated(parent)


class _Writer:
    """Writes the runs of one campaign."""

    def __init__(
        self,
        client: MlflowClient,
        campaign: Campaign,
        experiment_id: str,
        at_once: int,
        sender: Mapping[str, str],
    ) -> None:
        self._client, self._campaign, self._experiment_id = client, campaign, experiment_id
        self._at_once, self._sender = at_once, sender
        self._began_ms = int(datetime.fromisoformat(campaign.started_at).timestamp() * 1000)
        self._evaluation = _evaluation_samples(campaign)

    def begin(self, content: str, files: Mapping[str, Path]) -> str:
        """The campaign's own run, all but ended."""
        campaign = self._campaign
        run_id = self._start(
            campaign.name, {**tracked.campaign_tags(campaign), "burnish.content": content, **_shown_tags(campaign)}
        )
        self._log(run_id, params=tracked.campaign_parameters(campaign))
        digests = sorted({one.calibration_digest for one in campaign.variants if one.calibration_digest})
        calibrations = [_calibration_samples(digest) for digest in digests]
        self._client.log_inputs(run_id, datasets=[self._evaluation, *calibrations])
        with scratch_folder() as folder:
            _write_campaign(campaign, files, folder)
            self._upload(run_id, folder)
        return run_id

    def candidate(self, candidate: Candidate, parent: str, models: Mapping[ModelKey, str]) -> str:
        """The run of one candidate, whole."""
        campaign, model_id = self._campaign, models.get(model_key(candidate))
        word, reason = tracked.outcome_words(campaign, candidate)
        tags = {
            **tracked.tags(campaign, candidate),
            MLFLOW_PARENT_RUN_ID: parent,
            "mlflow.note.content": tracked.shortened(f"**{word}**: {reason}", tracked.MOST_TAG_CHARS),
        }
        if model_id is not None:
            tags["burnish.logged_model"] = model_id
        run_id = self._start(candidate.name, tags)
        self._log(
            run_id,
            params=tracked.parameters(campaign, candidate),
            metrics=self._metrics(candidate, model_id),
        )
        datasets = [self._evaluation]
        variant = variant_of(campaign, candidate)
        if variant is not None and variant.calibration_digest:
            datasets.append(_calibration_samples(variant.calibration_digest))
        linked = [] if model_id is None else [LoggedModelInput(model_id)]
        self._client.log_inputs(run_id, datasets=datasets, models=linked)
        rendered = campaign.rendered.get(candidate.id, {})
        if rendered:
            with scratch_folder() as folder:
                _write_texts({f"rendered/{path}": text for path, text in rendered.items()}, folder)
                self._client.log_artifacts(run_id, str(folder))
        self._client.set_terminated(run_id, _FAILED if word == "failed" else _FINISHED)
        return run_id

    def search(self, number: int, search: ServingSearch, parent: str) -> str:
        """The run of one search for a serving profile, whole."""
        tags = tracked.search_tags(self._campaign, search)
        run_id = self._start(
            f"search {search.variant_name}".strip(),
            {
                **tags,
                "burnish.search": str(number),
                MLFLOW_PARENT_RUN_ID: parent,
                "mlflow.note.content": tags["burnish.reason"],
                "mlflow.loggedArtifacts": json.dumps([{"path": "search.json", "type": "table"}]),
            },
        )
        metrics = [self._metric(point) for point in tracked_metrics.search_curves(search)]
        self._log(run_id, params=tracked.search_parameters(search), metrics=metrics)
        with scratch_folder() as folder:
            _write_texts({"search.json": json.dumps(tracked.search_table(search))}, folder)
            self._client.log_artifacts(run_id, str(folder))
        self._client.set_terminated(run_id)
        return run_id

    def _start(self, name: str, tags: Mapping[str, str]) -> str:
        given = {"mlflow.source.name": "burnish", "mlflow.source.type": "LOCAL", **self._sender, **tags}
        run = self._client.create_run(self._experiment_id, start_time=self._began_ms, tags=given, run_name=name)
        return str(run.info.run_id)

    def _metrics(self, candidate: Candidate, model_id: str | None) -> list[Metric]:
        """All metrics of a candidate; those that are the model's own, however it is served, on the model as well."""
        campaign, samples = self._campaign, self._evaluation.dataset
        found = [
            self._single(name, value, model_id=model_id, samples=samples if model_id else None)
            for name, value in tracked_metrics.judged_metrics(campaign, candidate).items()
        ]
        found += [
            self._single(name, value, model_id=model_id)
            for name, value in tracked_metrics.model_metrics(campaign, candidate).items()
        ]
        found += [
            self._single(name, value) for name, value in tracked_metrics.served_metrics(campaign, candidate).items()
        ]
        for curves in _CURVES:
            found += [self._metric(point) for point in curves(campaign, candidate)]
        return found

    def _metric(self, point: tracked_metrics.Point) -> Metric:
        return Metric(key=point.name, value=point.value, timestamp=self._began_ms, step=point.step)

    def _single(
        self, name: str, value: float, *, model_id: str | None = None, samples: Dataset | None = None
    ) -> Metric:
        return Metric(
            key=name, value=value, timestamp=self._began_ms, step=0, model_id=model_id,
            dataset_name=None if samples is None else samples.name,
            dataset_digest=None if samples is None else samples.digest,
        )  # fmt: skip

    def _log(self, run_id: str, *, params: Mapping[str, str], metrics: Sequence[Metric] = ()) -> None:
        """Parameters and metrics in as few calls as MLflow's limits allow."""
        given = [Param(name, value) for name, value in params.items()]
        kept = [metric for metric in metrics if math.isfinite(metric.value)]
        while given or kept:
            now, given = given[:MOST_PARAMS], given[MOST_PARAMS:]
            room = MOST_METRICS - len(now)
            self._client.log_batch(run_id, params=now, metrics=kept[:room])
            kept = kept[room:]

    def _upload(self, run_id: str, folder: Path) -> None:
        """The files of a folder, several at a time."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())

        def upload(path: Path) -> None:
            place = path.relative_to(folder).parent.as_posix()
            self._client.log_artifact(run_id, str(path), None if place == "." else place)

        each(upload, paths, at_once=self._at_once)


def _kind(run: Run) -> str:
    return str(run.data.tags.get("burnish.kind", "candidate"))


def _content(run: Run) -> str:
    return str(run.data.tags.get("burnish.content", ""))


def _parent(run: Run) -> str:
    """The id of its campaign's run; empty for that itself."""
    return str(run.data.tags.get(MLFLOW_PARENT_RUN_ID, ""))


def _ended(run: Run) -> bool:
    return run.info.status in {_FINISHED, _FAILED}


def _ended_at(run: Run) -> tuple[int, str]:
    """What orders runs by their ends, the same for whoever looks."""
    return run.info.end_time or 0, run.info.run_id


# --- samples -----------------------------------------------------------------------------------------------------


def _evaluation_samples(campaign: Campaign) -> DatasetInput:
    """The evaluation samples as MLflow knows a dataset; the samples themselves stay where they are."""
    name = campaign.samples_name or "evaluation samples"
    rows = max((one.samples for one in campaign.fidelities), default=None)
    schema = schema_of(campaign.sources[0].artifact.inputs) if campaign.sources else None
    dataset = Dataset(
        name=name,
        digest=campaign.samples_digest[:_DATASET_DIGEST_CHARS],
        source_type="local",
        source=json.dumps({"uri": name}),
        schema=None if schema is None else json.dumps(TensorDatasetSchema(features=schema).to_dict()),
        profile=None if rows is None else json.dumps({"num_rows": rows}),
    )
    return DatasetInput(dataset, tags=[InputTag(MLFLOW_DATASET_CONTEXT, "evaluation")])


def _calibration_samples(digest: str) -> DatasetInput:
    """The samples that a variant took its ranges from."""
    name = "calibration samples"
    dataset = Dataset(
        name=name, digest=digest[:_DATASET_DIGEST_CHARS], source_type="local", source=json.dumps({"uri": name})
    )
    return DatasetInput(dataset, tags=[InputTag(MLFLOW_DATASET_CONTEXT, "calibration")])


# --- files -------------------------------------------------------------------------------------------------------


def _shown_tags(campaign: Campaign) -> dict[str, str]:
    """What MLflow's own pages show of the campaign: a description, and the tables."""
    description = render_markdown(campaign)
    return {
        "mlflow.note.content": description if len(description) <= tracked.MOST_TAG_CHARS else campaign.verdict.sentence,
        "mlflow.loggedArtifacts": json.dumps([{"path": name, "type": "table"} for name in TABLES]),
    }


def _write_campaign(campaign: Campaign, files: Mapping[str, Path], folder: Path) -> None:
    texts = {
        "campaign.json": codec.dumps(campaign) + "\n",
        "host.json": codec.canonical({"host": codec.to_jsonable(campaign.host), "versions": dict(campaign.versions)}),
        "failures.json": json.dumps(tracked.failures_table(campaign)),
        "curves.json": json.dumps(tracked.curves_table(campaign)),
    }
    _write_texts(texts, folder)
    for name, path in files.items():
        shutil.copyfile(path, inside(folder, name))


def _write_texts(texts: Mapping[str, str], folder: Path) -> None:
    for name, text in texts.items():
        inside(folder, name).write_text(text, encoding="utf-8")
