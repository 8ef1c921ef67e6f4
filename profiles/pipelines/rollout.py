"""A pipeline's new step variants, promoted together: a challenger beside it, an Experiment between, and the way back.

A step of a pipeline is a Model of the same name. So the challenger is a Pipeline of its own that names other Models
where steps change, and to promote is to have the production Pipeline name them: one resource changes, and no request
meets some of the new variants and not others. The Models that it named before stay, so that the way back is one
resource too; nobody else's Pipeline or caller loses them.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from profiles.deploy.rollout import Applier, ManifestRollout, challenger_name, experiment_name, owned
from profiles.pipelines.documents import ManifestPart, SpecPart
from profiles.serving.core2.manifests import Manifest, as_yaml, render_experiment
from profiles.serving.naming import check_core2_name
from registry.codec import canonical
from registry.documents import parse_document
from registry.errors import InputError
from registry.records import RolloutSnapshot

# All of a step's outputs, said at length.
_WHOLE = re.compile(r"^([^.]+)\.outputs$")


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
    if twice := sorted({model for model in models.values() if list(models.values()).count(model) > 1}):
        raise InputError(f"the Model {twice[0]!r} is to take the place of two steps", hint="Name each Model once.")
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
    challenger, name = challenger_name(production, "Pipeline"), experiment_name(production)
    marks = dict(labels or {})
    if mirror is not None:
        weights, copied = {production: 100}, (challenger, mirror)
        return render_experiment(
            name, weights, labels=marks, default=production, mirror=copied, resource_type="pipeline"
        )
    share = percent or 0
    weights = {production: 100 - share, challenger: share}
    return render_experiment(name, weights, labels=marks, default=production, resource_type="pipeline")


class PipelineRollout(ManifestRollout):
    """The `registry.ports.Rollout` of one production Pipeline.

    Of the Models that the challenger names, some are served already, each promoted or deployed by itself. Others are
    brought: served from `load` on, and taken away on the way back, unless another Pipeline has taken them up meanwhile.
    """

    kind = "Pipeline"

    def __init__(
        self,
        applier: Applier,
        *,
        production: str,
        folder: Path,
        models: Mapping[str, str] | None = None,
        brought: Mapping[str, Callable[[], Manifest]] | None = None,
    ) -> None:
        """Applies nothing yet.

        Args:
            applier: has manifests applied; it has to know Pipelines.
            production: the Pipeline that callers ask.
            folder: keeps the manifests that are applied, as text.
            models: step -> Model to take its place; None where all that is to be done is to go back.
            brought: those of these Models that are not served yet -> their manifests, with the labels of `owned`. Of a
                name there is only one such Model ever: who finds it served takes it as it is.

        Raises:
            InputError: Core 2 takes no such name.
        """
        super().__init__(applier, production=production, folder=folder, render=None)
        self._models = dict(models or {})
        self._brought = dict(brought or {})

    def snapshot(self) -> RolloutSnapshot:
        """What is applied and in force now; see `registry.ports.Rollout`.

        Raises:
            InputError: there is no such Pipeline, or it does not have such a step; a Model is not served; or another
                promotion is under way.
        """
        taken = super().snapshot()
        if not taken.serving:
            raise InputError(f"there is no Pipeline {self.production} at {self.location}", hint="Deploy it first.")
        self._swapped(taken)
        absent = []
        for step, model in self._models.items():
            if self._applier.exists("Model", model):
                continue
            if model not in self._brought:
                raise InputError(
                    f"there is no Model {model!r} for the step {step!r} at {self.location}",
                    hint="Deploy it first, or name what it is to serve with --step or --variant.",
                )
            absent.append(f"Model/{model}")
        return replace(taken, absent=(*taken.absent, *absent))

    def load(self, snapshot: RolloutSnapshot) -> None:
        """Serves the Models that are brought, with as many replicas as those in their place; then the challenger."""
        for step, model in self._models.items():
            if model in self._brought and (f"Model/{model}" in snapshot.absent):
                manifest = copy.deepcopy(self._brought[model]())
                self._put({**manifest, "spec": {**manifest["spec"], "replicas": self._applier.replicas(step)}})
        made = with_models(_found(self._before(snapshot)), self._models, name=self.challenger)
        self._put({**made, "metadata": {"name": self.challenger, "labels": owned(self.production)}})

    def restore(self, snapshot: RolloutSnapshot) -> None:
        """Makes all as it was: the production Pipeline first, as long as the split goes on.

        Raises:
            UnreachableError: it does not come about, or what is in force then is not what was.
        """
        brought = [key.removeprefix("Model/") for key in snapshot.absent if key.startswith("Model/")]
        others = tuple(key for key in snapshot.absent if not key.startswith("Model/"))
        super().restore(replace(snapshot, absent=others))
        for model in brought:
            if not self._applier.used_by(model):
                self._drop("Model", model)

    # --- parts of it ---

    def _served(self, found: Manifest | None) -> str:
        return "" if found is None else canonical(self._plain(found["spec"]))

    def _plain(self, spec: Mapping[str, Any]) -> Mapping[str, Any]:
        return plain_spec(spec, self.production)

    def _swapped(self, snapshot: RolloutSnapshot) -> Manifest:
        """The production Pipeline with the challenger's Models."""
        return with_models(_found(self._before(snapshot)), self._models)


def plain_spec(spec: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A Pipeline's ``spec`` in the one form that all who say the same share: defaults told, ``step.outputs`` as step.

    Raises:
        InputError: it has a field that is not known.
    """
    try:
        whole = SpecPart.model_validate(spec).model_dump(mode="json", exclude_none=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"the Pipeline {name} cannot be read at spec.{where}: {first['msg']}",
            hint="burnish promotes what it could restore alone.",
        ) from error
    for part in (*whole["steps"], whole.get("input", {}), whole.get("output", {})):
        for key in ("inputs", "triggers", "externalInputs", "externalTriggers", "steps"):
            if key in part:
                part[key] = [_WHOLE.sub(r"\1", text) for text in part[key]]
    return whole


def _found(manifest: Manifest | None) -> Manifest:
    if manifest is None:
        raise InputError("there is no Pipeline in production", hint="Deploy it first.")
    return manifest


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
    found = {
        "0-way-back": dict(manifest),
        "1-challenger": with_models(manifest, models, name=challenger_name(name, "Pipeline")),
    }
    found["2-mirror"] = experiment_of(name, mirror=100)
    for place, share in enumerate(shares, 3):
        found[f"{place}-share-{share}"] = experiment_of(name, percent=share)
    found[f"{len(shares) + 3}-promoted"] = with_models(manifest, models)
    return found
