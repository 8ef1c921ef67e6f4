"""MLflow's model registry: the `registry.ports.ModelRegistry` of versions that burnish registered.

MLflow gives an alias to a version without looking at who has it, so that whoever must not take it from somebody looks
before and after. Who was the champion when is kept in tags of the registered model, which MLflow's pages show; the
version that is the champion has the newest of them as tags of its own.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from registry import codec
from registry.errors import InputError, UnreachableError
from registry.mlflow_store import ABSENT, default_store, named_failures, pages, patient
from registry.mlflow_tracking import MlflowTracker
from registry.ports import RegisteredVersion
from registry.records import Reign
from registry.tracking import redact

REIGN = "burnish.champion."
"""Begins the name of the tag of each reign."""
_IDENTITY = ("burnish.campaign_id", "burnish.candidate_id", "burnish.content")
_MOST_TAG_CHARS = 5000


class MlflowRegistry:
    """Implements `registry.ports.ModelRegistry`.

    Args:
        uri: of the tracking store, which has the registry too.
        work: the working folder.
    """

    def __init__(self, uri: str, work: Path) -> None:
        self._uri = uri
        self._tracker = MlflowTracker(uri, work)

    def check(self) -> None:
        """Returns when the registry answers.

        Raises:
            UnreachableError: it does not.
        """
        self._tracker.check()

    def find(self, model: str, *, campaign_id: str, candidate_id: str) -> RegisteredVersion | None:
        """The newest version that a campaign's candidate was registered as; see `registry.ports.ModelRegistry`."""
        wanted = {"burnish.campaign_id": campaign_id, "burnish.candidate_id": candidate_id}
        with named_failures(self._uri), patient():
            versions = [one for one in self._versions(model) if wanted.items() <= dict(one.tags).items()]
            newest = max(versions, key=lambda one: int(one.version), default=None)
            return None if newest is None else self._told(newest)

    def version(self, model: str, version: str) -> RegisteredVersion | None:
        """A version, or None; see `registry.ports.ModelRegistry`."""
        with named_failures(self._uri), patient():
            try:
                return self._told(self._client.get_model_version(model, version))
            except MlflowException as error:
                if error.error_code in ABSENT:
                    return None
                raise

    def aliases(self, model: str) -> Mapping[str, str]:
        """Alias -> version; empty where there is no such model."""
        with named_failures(self._uri), patient():
            found = self._model(model)
            return {} if found is None else {name: str(version) for name, version in dict(found.aliases).items()}

    def set_alias(self, model: str, alias: str, version: str | None) -> None:
        """Gives an alias to a version, or takes it away.

        Raises:
            InputError: there is no such version.
            UnreachableError: the registry does not answer, refuses, or says afterwards that somebody else has it.
        """
        if self.aliases(model).get(alias) == version:
            return
        with named_failures(self._uri), patient():
            try:
                if version is None:
                    self._client.delete_registered_model_alias(model, alias)
                else:
                    self._client.set_registered_model_alias(model, alias, version)
            except MlflowException as error:
                if error.error_code not in ABSENT:
                    raise
                raise InputError(f"{model} has no version {version} that could be called {alias}") from None
        if (found := self.aliases(model).get(alias)) != version:
            raise UnreachableError(
                f"the alias {alias} of {model} was given to version {version}, and version {found} has it",
                hint="Somebody else gave it away at the same time.",
            )

    def crown(self, reign: Reign) -> None:
        """Keeps a reign in the tags of the model, and in those of its version."""
        reign_key = f"{REIGN}{reign.since}.{reign.promotion_id}.{reign.how.replace(' ', '-')}"
        with named_failures(self._uri), patient():
            room = _MOST_TAG_CHARS - 1000
            kept = codec.dumps(reign)
            if len(kept) > _MOST_TAG_CHARS:
                shortened = {**codec.to_jsonable(reign), "reason": f"{reign.reason[:room]}..."}
                kept = codec.dumps(codec.from_jsonable(Reign, shortened))
            self._client.set_registered_model_tag(reign.model, _named(reign_key), kept)
            if reign.version is not None:
                tags = {"burnish.champion_since": reign.since, "burnish.champion_reason": reign.reason[:room]}
                tags |= {"burnish.candidate": reign.candidate} if reign.candidate else {}
                for name, value in tags.items():
                    self._client.set_model_version_tag(reign.model, reign.version, name, value)

    def reigns(self, model: str) -> tuple[Reign, ...]:
        """All reigns, the first one first; see `registry.ports.ModelRegistry`.

        Raises:
            InputError: there is no such registered model, or a tag of it is damaged.
        """
        with named_failures(self._uri), patient():
            found = self._model(model)
        if found is None:
            known = self._names()
            raise InputError(
                f"the registry {redact(self._uri)} has no model {model!r}",
                hint=f"It has: {', '.join(known) or 'none'}.",
            )
        kept = [codec.loads(value) for name, value in dict(found.tags).items() if name.startswith(REIGN)]
        return tuple(sorted((one for one in kept if isinstance(one, Reign)), key=lambda one: one.since))

    # --- parts of it ---

    @cached_property
    def _client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)

    def _model(self, model: str) -> RegisteredModel | None:
        try:
            return self._client.get_registered_model(model)
        except MlflowException as error:
            if error.error_code in ABSENT:
                return None
            raise

    def _names(self) -> list[str]:
        with named_failures(self._uri), patient():
            return sorted(str(one.name) for one in self._client.search_registered_models(max_results=20))

    def _versions(self, model: str) -> Iterator[ModelVersion]:
        query = f"name = '{model}'"
        return pages(lambda token: self._client.search_model_versions(query, page_token=token))

    def _told(self, found: ModelVersion) -> RegisteredVersion:
        tags = dict(found.tags)
        identity = [found.source, found.status, *(tags.get(name, "") for name in _IDENTITY)]
        return RegisteredVersion(
            model=str(found.name),
            version=str(found.version),
            fingerprint=codec.digest(identity),
            candidate_id=tags.get("burnish.candidate_id", ""),
            candidate=tags.get("burnish.candidate", ""),
            signature=self._signature(found),
        )

    def _signature(self, found: ModelVersion) -> str | None:
        """Its inputs and outputs as the logged model has them; None where it has none, or cannot be read."""
        import mlflow

        try:
            with default_store(self._uri, needed=True):
                signature = mlflow.models.get_model_info(f"models:/{found.name}/{found.version}").signature
        except (MlflowException, OSError):
            return None
        if signature is None or signature.inputs is None or signature.outputs is None:
            return None
        return codec.canonical([_tensors(signature.inputs), _tensors(signature.outputs)])


def _tensors(schema: Any) -> list[list[Any]]:
    return sorted([str(one.name), str(getattr(one, "type", "")), list(getattr(one, "shape", ()))] for one in schema)


def _named(tag: str) -> str:
    """A tag's name in the characters that MLflow takes."""
    return tag.replace("+", "-").replace(":", "-")
