"""A pipeline's new step variants, promoted together: a challenger beside it, an Experiment between, and the way back.

A step of a pipeline is a Model of the same name. So the challenger is a Pipeline of its own that names other Models
where steps change, and to promote is to have the production Pipeline name them: one resource changes, and no request
meets some of the new variants and not others. The Models that it named before stay, so that the way back is one
resource too; nobody else's Pipeline or caller loses them.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from profiles.deploy.rollout import Applier, owned
from profiles.pipelines.documents import ManifestPart
from profiles.serving.core2.manifests import Manifest, as_yaml, render_experiment
from profiles.serving.naming import check_core2_name
from registry.codec import canonical
from registry.documents import parse_document
from registry.errors import InputError, UnreachableError
from registry.ledger import write_durably
from registry.records import RolloutSnapshot


def challenger_of(name: str) -> str:
    """The name of the Pipeline beside a production Pipeline.

    Raises:
        InputError: Core 2 takes no such name.
    """
    check_core2_name(f"{name}-challenger", "Pipeline")
    return f"{name}-challenger"


def with_models(manifest: Mapping[str, Any], models: Mapping[str, str], *, name: str | None = None) -> Manifest:
    """A Pipeline in which some steps are other Models.

    Args:
        manifest: as Core 2 has it.
        models: step -> Model to take its place.
        name: of the pipeline that is made; None for the same one.

    Raises:
        InputError: a step is unknown, or a Model's name is one of another step, or none for Core 2.
    """
    spec, old = copy.deepcopy(dict(manifest["spec"])), str(manifest["metadata"]["name"])
    steps = [str(step["name"]) for step in spec["steps"]]
    if unknown := sorted(set(models) - set(steps)):
        raise InputError(f"the pipeline {old!r} has no step {unknown[0]!r}", hint=f"Its steps are: {', '.join(steps)}.")
    for step, model in models.items():
        check_core2_name(model, "Model")
        if model in steps and model != step:
            raise InputError(
                f"the Model {model!r} for the step {step!r} is another step's", hint="Name each Model once."
            )
    new = name or old
    names = {**models, old: new} if old not in steps else dict(models)

    def renamed(text: str) -> str:
        first, dot, rest = text.partition(".")
        return names.get(first, first) + dot + rest

    for step in spec["steps"]:
        _rename(step, ("inputs", "triggers"), renamed)
        step["name"] = models.get(step["name"], step["name"])
    if spec.get("output"):
        _rename(spec["output"], ("steps",), renamed)
    metadata = {**manifest["metadata"], "name": new}
    made = {"apiVersion": manifest["apiVersion"], "kind": "Pipeline", "metadata": metadata, "spec": spec}
    parse_document(as_yaml(made), ManifestPart, name=f"Pipeline {new}")
    return made


def _rename(part: dict[str, Any], lists: Sequence[str], renamed: Any) -> None:
    for key in lists:
        if part.get(key):
            part[key] = [renamed(text) for text in part[key]]
    if part.get("tensorMap"):
        part["tensorMap"] = {renamed(key): value for key, value in part["tensorMap"].items()}


def experiment_of(
    production: str, *, percent: int | None = None, mirror: int | None = None, labels: Mapping[str, str] | None = None
) -> Manifest:
    """The split between a production Pipeline and its challenger, by shares or by copies.

    Args:
        production: the Pipeline that callers ask.
        percent: of requests that the challenger answers.
        mirror: percent of requests that it gets copies of.
        labels: of the resource.
    """
    challenger, name = challenger_of(production), f"{production}-promotion"
    marks = dict(labels or {})
    if mirror is not None:
        weights, copied = {production: 100}, (challenger, mirror)
        return render_experiment(
            name, weights, labels=marks, default=production, mirror=copied, resource_type="pipeline"
        )
    share = percent or 0
    weights = {production: 100 - share, challenger: share}
    return render_experiment(name, weights, labels=marks, default=production, resource_type="pipeline")


class PipelineRollout:
    """The `registry.ports.Rollout` of one production Pipeline.

    The Models that the challenger names are served already: each was promoted, or deployed, by itself.
    """

    def __init__(self, applier: Applier, *, production: str, models: Mapping[str, str], folder: Path) -> None:
        """Applies nothing yet.

        Args:
            applier: has manifests applied; it has to know Pipelines.
            production: the Pipeline that callers ask.
            models: step -> Model to take its place.
            folder: keeps the manifests that are applied, as text.

        Raises:
            InputError: Core 2 takes no such name.
        """
        self.production = production
        self.challenger = challenger_of(production)
        self.experiment = f"{production}-promotion"
        self._applier = applier
        self._models = dict(models)
        self._folder = folder

    @property
    def location(self) -> str:
        """Where it is in production, for people."""
        return self._applier.location

    def snapshot(self) -> RolloutSnapshot:
        """What is applied and in force now.

        Raises:
            InputError: there is no such Pipeline, a Model is not served, or another promotion is under way.
        """
        found = self._applier.read("Pipeline", self.production)
        if found is None:
            raise InputError(f"there is no Pipeline {self.production} at {self.location}", hint="Deploy it first.")
        for kind, name in (("Pipeline", self.challenger), ("Experiment", self.experiment)):
            if self._applier.read(kind, name) is not None:
                raise InputError(
                    f"there is a {kind} {name} at {self.location} already", hint="End that promotion first."
                )
        for step, model in self._models.items():
            if self._applier.read("Model", model) is None:
                raise InputError(f"there is no Model {model!r} for the step {step!r} at {self.location}")
        key = f"Pipeline/{self.production}"
        return RolloutSnapshot(
            manifests={key: as_yaml(found)},
            live={key: canonical(found["spec"])},
            absent=(f"Experiment/{self.experiment}", f"Pipeline/{self.challenger}"),
            serving=canonical(found["spec"]),
        )

    def serving(self) -> str:
        """What the production Pipeline is, as JSON; empty where there is none."""
        found = self._applier.read("Pipeline", self.production)
        return "" if found is None else canonical(found["spec"])

    def planned(self, snapshot: RolloutSnapshot) -> str:
        """What `serving` tells after `swap`."""
        return canonical(self._swapped(snapshot)["spec"])

    def load(self, snapshot: RolloutSnapshot) -> None:
        """Deploys the challenger; it gets no requests yet."""
        made = with_models(self._before(snapshot), self._models, name=self.challenger)
        made["metadata"] = {"name": self.challenger, "labels": owned(self.production)}
        self._put(made)

    def mirror(self, percent: int) -> None:
        """The challenger gets copies of so many percent of the requests."""
        self._put(experiment_of(self.production, mirror=percent, labels=owned(self.production)))

    def weights(self, percent: int) -> None:
        """The challenger answers so many percent of the requests."""
        self._put(experiment_of(self.production, percent=percent, labels=owned(self.production)))

    def swap(self, snapshot: RolloutSnapshot) -> None:
        """The production Pipeline names the challenger's Models."""
        self._put(self._swapped(snapshot))

    def unload(self) -> None:
        """Ends the split, then the challenger; Models stay."""
        self._drop("Experiment", self.experiment)
        self._drop("Pipeline", self.challenger)

    def restore(self, snapshot: RolloutSnapshot) -> None:
        """Makes all as it was: the production Pipeline first, as long as the split goes on.

        Raises:
            UnreachableError: it does not come about, or what is in force then is not what was.
        """
        key = f"Pipeline/{self.production}"
        if self.serving() != snapshot.live[key]:
            self._put(self._before(snapshot))
        self.unload()
        if (found := self.serving()) != snapshot.live[key]:
            raise UnreachableError(
                f"the Pipeline {self.production} is in force otherwise than before: {found or 'gone'}",
                hint="Something else changes it.",
            )

    # --- parts of it ---

    def _before(self, snapshot: RolloutSnapshot) -> Manifest:
        key = f"Pipeline/{self.production}"
        return parse_document(snapshot.manifests[key], ManifestPart, name=key).model_dump(
            mode="json", exclude_unset=True
        )

    def _swapped(self, snapshot: RolloutSnapshot) -> Manifest:
        return with_models(self._before(snapshot), self._models)

    def _put(self, manifest: Manifest) -> None:
        write_durably(self._path(str(manifest["kind"]), str(manifest["metadata"]["name"])), as_yaml(manifest))
        self._applier.apply(manifest)

    def _drop(self, kind: str, name: str) -> None:
        self._applier.delete(kind, name)
        self._path(kind, name).unlink(missing_ok=True)

    def _path(self, kind: str, name: str) -> Path:
        return self._folder / f"{kind}-{name}.yaml"


def stages_of(manifest: Mapping[str, Any], models: Mapping[str, str], shares: Sequence[int]) -> dict[str, Manifest]:
    """Every manifest of a promotion by hand, under a file's name, in the order in which they are applied.

    Args:
        manifest: the production Pipeline.
        models: step -> Model to take its place.
        shares: percent of requests that the challenger answers, rising.

    Raises:
        InputError: see `with_models`; or a share is none.
    """
    name = str(manifest["metadata"]["name"])
    if not shares or any(not 0 < share < 100 for share in shares) or list(shares) != sorted(set(shares)):
        raise InputError(f"shares of {', '.join(map(str, shares)) or 'nothing'}", hint="They rise, between 1 and 99.")
    found = {"0-way-back": dict(manifest), "1-challenger": with_models(manifest, models, name=challenger_of(name))}
    found["2-mirror"] = experiment_of(name, mirror=100)
    for place, share in enumerate(shares, 3):
        found[f"{place}-share-{share}"] = experiment_of(name, percent=share)
    found[f"{len(shares) + 3}-promoted"] = with_models(manifest, models)
    return found
