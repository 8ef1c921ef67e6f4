"""How traffic moves from a champion to a challenger: by manifests of Core 2, whoever applies them.

Three resources are all there is: the production Model, which callers ask; the challenger's Model beside it; and the
Experiment between the two. Each method writes the manifest that it wants into the folder of applied manifests first,
and then has it applied, so that the same call again completes what a kill cut short. Of Pipelines it is the same; see
`profiles.pipelines.rollout`.
"""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from profiles.deploy.kubernetes_resources import CAMPAIGN, RUN
from profiles.serving.core2.manifests import Manifest, as_yaml, render_experiment
from profiles.serving.core2.sizing import quantity_bytes
from profiles.serving.naming import check_core2_name
from registry.codec import canonical
from registry.documents import parse_document
from registry.errors import InputError, UnreachableError
from registry.ledger import write_durably
from registry.records import RolloutSnapshot

PRODUCTION = "production"
"""The run that resources of production carry as a label: they are no campaign's, and nobody clears them away."""
# What makes a Model another one; how many replicas there are does not.
_IDENTITY = ("storageUri", "artifactVersion", "requirements", "server", "parameters", "secretName")


class Applier(Protocol):
    """Applies resources of Core 2 somewhere, and knows what is in force there."""

    @property
    def location(self) -> str:
        """Where that is, for people."""

    def read(self, kind: str, name: str) -> Manifest | None:
        """What is in force: kind, metadata with name and labels, and spec; None where there is nothing.

        Of an experiment that cannot be read, the spec is empty.
        """

    def apply(self, manifest: Manifest) -> None:
        """Has a resource made or changed, and returns when it is in force.

        Raises:
            InputError: it is refused.
            UnreachableError: it does not come about.
        """

    def delete(self, kind: str, name: str) -> None:
        """Takes a resource away, and returns when it is gone; of one that is not there, at once."""

    def exists(self, kind: str, name: str) -> bool:
        """Whether there is one of this name, whoever made it."""

    def splits(self, name: str) -> tuple[str, ...]:
        """The names of the experiments that share out a model's or pipeline's requests, as far as that can be known."""

    def used_by(self, model: str) -> tuple[str, ...]:
        """The names of the pipelines that a model is a step of, whoever made them."""

    def replicas(self, model: str) -> int:
        """How many replicas a Model has, whoever made it; 1 where that is not known."""

    def is_scaled(self, model: str) -> bool:
        """Whether something else says how many replicas a Model has, so that a manifest must not."""


class _Text(BaseModel):
    """Any resource."""

    model_config = ConfigDict(extra="allow", frozen=True)
    kind: str
    metadata: dict[str, Any]
    spec: dict[str, Any]


def owned(production: str, **more: str) -> dict[str, str]:
    """The labels of everything that belongs to a production Model."""
    return {CAMPAIGN: f"{PRODUCTION}-{production}"[:63].rstrip("-"), RUN: PRODUCTION, **more}


def challenger_name(production: str, kind: str = "Model") -> str:
    """The name of the Model beside a production Model; of the Pipeline beside a Pipeline.

    Raises:
        InputError: Core 2 takes no such name.
    """
    check_core2_name(f"{production}-challenger", kind)
    return f"{production}-challenger"


def experiment_name(production: str) -> str:
    """The name of the split between the two."""
    return f"{production}-promotion"


class ManifestRollout:
    """The `registry.ports.Rollout` of one production Model, by manifests."""

    kind: ClassVar[Literal["Model", "Pipeline"]] = "Model"

    def __init__(
        self, applier: Applier, *, production: str, folder: Path, render: Callable[[str], Manifest] | None
    ) -> None:
        """Applies nothing yet.

        Args:
            applier: has manifests applied.
            production: the name of the Model that callers ask.
            folder: keeps the manifests that are applied, as text.
            render: gives the challenger's Model under a name, with the labels of `owned`; None where all that is to be
                done is to go back.

        Raises:
            InputError: Core 2 takes no such name.
        """
        check_core2_name(production, self.kind)
        self.production = production
        self.challenger = challenger_name(production, self.kind)
        self.experiment = experiment_name(production)
        self._applier = applier
        self._folder = folder
        self._render = render

    @property
    def location(self) -> str:
        """Where it is in production, for people."""
        return self._applier.location

    def snapshot(self) -> RolloutSnapshot:
        """What is applied and in force now; see `registry.ports.Rollout`."""
        for kind, name in ((self.kind, self.challenger), ("Experiment", self.experiment)):
            if self._applier.read(kind, name) is not None:
                raise InputError(
                    f"there is a{'n' if kind[0] in 'AEIOU' else ''} {kind} {name} at {self.location} already",
                    hint="Another promotion is under way from another folder, or left it: end that one, or delete it.",
                )
        if others := [name for name in self._applier.splits(self.production) if name != self.experiment]:
            raise InputError(
                f"the Experiment {others[0]} shares out the requests to {self.production} already",
                hint=f"End it first: Core 2 lets one experiment take over a {self.kind.lower()}'s endpoint.",
            )
        absent = [_key(self.kind, self.challenger), _key("Experiment", self.experiment)]
        found, key = self._applier.read(self.kind, self.production), _key(self.kind, self.production)
        if found is None:
            return RolloutSnapshot(manifests={}, live={}, absent=(*absent, key), serving="")
        return RolloutSnapshot(
            manifests={key: self._text_of(found)},
            live={key: canonical(found["spec"])},
            absent=tuple(absent),
            serving=self._served(found),
        )

    def serving(self) -> str:
        """What the production Model serves: where its folder is, and what else makes it another one, as JSON."""
        return self._served(self._applier.read(self.kind, self.production))

    def planned(self, snapshot: RolloutSnapshot) -> str:
        """What `serving` tells after `swap`."""
        return self._served(self._swapped(snapshot))

    def load(self, snapshot: RolloutSnapshot) -> None:
        """Serves the challenger, with as many replicas as the champion has."""
        manifest = self._rendered(self.challenger)
        live = snapshot.live.get(_key("Model", self.production))
        if live is not None:
            manifest["spec"]["replicas"] = json.loads(live).get("replicas", 1)
        self._put(manifest)

    def mirror(self, percent: int) -> None:
        """The challenger gets copies of so many percent of the requests."""
        self._split({self.production: 100}, mirror=(self.challenger, percent))

    def weights(self, percent: int) -> None:
        """The challenger answers so many percent of the requests."""
        self._split({self.production: 100 - percent, self.challenger: percent})

    def swap(self, snapshot: RolloutSnapshot) -> None:
        """The production Model serves what the challenger does."""
        self._put(self._swapped(snapshot))

    def unload(self) -> None:
        """Ends the split, then the challenger beside the production Model."""
        self._drop("Experiment", self.experiment)
        self._drop(self.kind, self.challenger)

    def restore(self, snapshot: RolloutSnapshot) -> None:
        """Makes all as it was.

        What is in production comes first: as long as it is another one, the split goes on.

        Raises:
            StorageError: a manifest cannot be written; what is in force is as it was.
            UnreachableError: it does not come about, or what is in force then is not what was.
        """
        for key, text in snapshot.manifests.items():
            kind, _, name = key.partition("/")
            manifest, wanted = _parsed(text, key), json.loads(snapshot.live[key])
            # Fields that the text does not have were somebody else's; where applying it lost them, they are told, too.
            for spec in (manifest["spec"], wanted):
                if not self._is_in_force(kind, name, wanted):
                    self._apply({**manifest, "spec": spec})
        for key in sorted(snapshot.absent):
            kind, _, name = key.partition("/")
            self._drop(kind, name)
        # Last: that there is no room for a file stops nothing from being as it was.
        for key, text in snapshot.manifests.items():
            if not self._path(key).is_file() or self._path(key).read_text(encoding="utf-8") != text:
                write_durably(self._path(key), text)
        self._check_restored(snapshot)

    # --- parts of it ---

    def _served(self, found: Manifest | None) -> str:
        """What makes it another one; empty where there is none."""
        return _identity(found)

    def _plain(self, spec: Mapping[str, Any]) -> Mapping[str, Any]:
        """A spec in the one form that all who say the same share."""
        return spec

    def _check_restored(self, snapshot: RolloutSnapshot) -> None:
        for key, wanted in snapshot.live.items():
            kind, _, name = key.partition("/")
            if not self._is_in_force(kind, name, json.loads(wanted)):
                found = self._applier.read(kind, name)
                raise UnreachableError(
                    f"the {kind} {name} was applied as it was before, and is in force otherwise: "
                    f"{'gone' if found is None else canonical(found['spec'])}, not {wanted}",
                    hint="Something else changes it: an autoscaler, or another hand.",
                )
        for key in snapshot.absent:
            kind, _, name = key.partition("/")
            if self._applier.read(kind, name) is not None:
                raise UnreachableError(f"the {kind} {name} was taken away, and is there again")

    def _is_in_force(self, kind: str, name: str, wanted: Mapping[str, Any]) -> bool:
        """Whether a spec is; where an autoscaler says how many replicas there are, that is left out."""
        found = self._applier.read(kind, name)
        left_out = {"replicas"} if kind == "Model" and self._applier.is_scaled(name) else set()
        specs = [{} if found is None else found["spec"], wanted]
        first, second = ({key: one[key] for key in one if key not in left_out} for one in specs)
        return found is not None and canonical(self._plain(first)) == canonical(self._plain(second))

    def _rendered(self, name: str) -> Manifest:
        if self._render is None:
            raise ValueError("this rollout can only go back")
        return copy.deepcopy(self._render(name))

    def _before(self, snapshot: RolloutSnapshot) -> Manifest | None:
        key = _key(self.kind, self.production)
        text = snapshot.manifests.get(key)
        return None if text is None else _parsed(text, key)

    def _swapped(self, snapshot: RolloutSnapshot) -> Manifest:
        """The production Model with what the challenger serves; how often it is served stays."""
        made, before = self._rendered(self.production), self._before(snapshot)
        if before is None:
            return made
        kept = {name: value for name, value in before["spec"].items() if name not in {*_IDENTITY, "memory"}}
        new = {name: made["spec"][name] for name in (*_IDENTITY, "memory") if name in made["spec"]}
        labels = {**before["metadata"].get("labels", {}), **made["metadata"].get("labels", {})}
        return {**made, "metadata": {"name": self.production, "labels": labels}, "spec": {**new, **kept}}

    def _split(self, weights: Mapping[str, int], mirror: tuple[str, int] | None = None) -> None:
        labels = owned(self.production)
        kind: Literal["model", "pipeline"] = "pipeline" if self.kind == "Pipeline" else "model"
        experiment = render_experiment(
            self.experiment, weights, labels=labels, default=self.production, mirror=mirror, resource_type=kind
        )
        self._put(experiment)

    def _put(self, manifest: Manifest) -> None:
        write_durably(self._path(_key(str(manifest["kind"]), str(manifest["metadata"]["name"]))), as_yaml(manifest))
        self._apply(manifest)

    def _apply(self, manifest: Manifest) -> None:
        kind, name = manifest["kind"], str(manifest["metadata"]["name"])
        if kind == "Model" and self._applier.is_scaled(name):
            spec = {key: value for key, value in manifest["spec"].items() if key != "replicas"}
            manifest = {**manifest, "spec": spec}
        # A text of others may go without; what is in force is given over, or it would not have been read.
        labels = {**owned(self.production), **(manifest["metadata"].get("labels") or {})}
        self._applier.apply({**manifest, "metadata": {**manifest["metadata"], "labels": labels}})

    def _drop(self, kind: str, name: str) -> None:
        self._applier.delete(kind, name)
        self._path(_key(kind, name)).unlink(missing_ok=True)

    def _text_of(self, found: Manifest) -> str:
        """The text that was applied, where that is what is in force; else what is in force as text."""
        key = _key(str(found["kind"]), str(found["metadata"]["name"]))
        path = self._path(key)
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            told, now = self._plain(_parsed(text, key)["spec"]), self._plain(found["spec"])
            left_out = {"replicas"} if self.kind == "Model" and self._applier.is_scaled(self.production) else set()
            # An API server adds defaults to what it was told.
            if all(_same(name, now.get(name), told[name]) for name in told.keys() - left_out):
                return text
        metadata = {name: found["metadata"][name] for name in ("name", "labels") if found["metadata"].get(name)}
        return as_yaml({"apiVersion": found["apiVersion"], "kind": found["kind"], "metadata": metadata} | _only(found))

    def _path(self, key: str) -> Path:
        return self._folder / f"{key.replace('/', '-')}.yaml"


def _key(kind: str, name: str) -> str:
    return f"{kind}/{name}"


def _only(found: Manifest) -> Manifest:
    return {"spec": found["spec"]}


def _parsed(text: str, key: str) -> Manifest:
    return parse_document(text, _Text, name=key).model_dump()


def _same(name: str, one: Any, other: Any) -> bool:
    if name == "memory" and None not in (one, other):
        return quantity_bytes(str(one)) == quantity_bytes(str(other))
    return bool(one == other)


def _identity(found: Manifest | None) -> str:
    if found is None:
        return ""
    spec = found["spec"]
    return canonical({name: spec[name] for name in _IDENTITY if spec.get(name) not in (None, [], "")})
