"""What Core 2's custom resources say of themselves, and what applying one would change. Nothing is asked here.

Core 2's operator writes a Model's state where others write prose, and the other way round: ``message`` is the name of
the state, ``reason`` the free text. It also never says which generation a status is of, so that the status of a
resource that was changed may be of before the change; see `is_stale`.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from profiles.deploy.core2_candidates import one_line
from profiles.serving.core2.manifests import STOCK_CAPABILITIES, Manifest

CAMPAIGN = "burnish.campaign"
RUN = "burnish.run"
WITHOUT_READINESS = frozenset({"ServerConfig", "HorizontalPodAutoscaler"})
"""Kinds that are in force once they are applied: nothing writes a ``Ready`` condition on them."""
AVAILABLE = "ModelAvailable"
GOING = frozenset({"ModelTerminating", "ModelTerminate", "ModelTerminated", "ModelTerminateFailed", "ModelScaledDown"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceState:
    """A resource of Core 2, as its status has it.

    Attributes:
        kind: ``Model``, ``Server``, ...
        name: its name.
        ready: whether it is in force, with all replicas that it asks for.
        state: Core 2's name of a Model's state; for other kinds the conditions that do not hold, or empty.
        reason: why it is not ready; free text.
        replicas: how many it asks for.
        available_replicas: how many there are; None where the status does not say.
        server: the Server that a Model is on; empty where it is on none.
    """

    kind: str
    name: str
    ready: bool
    state: str
    reason: str
    replicas: int
    available_replicas: int | None
    server: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What was applied, and the status that stood there before.

    Attributes:
        kind: ``Model``, ``Server``, ...
        name: its name.
        uid: Kubernetes' own name of it; another one of the same name has another.
        generation: counts the changes of its spec.
        before: its ``Ready`` condition from before the change; None where nothing was there or nothing has changed.
        resource: the whole of it, as the API server answered.
    """

    kind: str
    name: str
    uid: str
    generation: int
    before: Mapping[str, Any] | None
    resource: Manifest = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldChange:
    """One field that would change: its path, and its values; None is for a field that is not there."""

    path: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What the API server says that applying a manifest would do.

    Attributes:
        kind: ``Model``, ``Server``, ...
        name: of the resource.
        action: ``create``, ``change`` or ``none``.
        fields: of labels and spec, in order of their paths; server-side defaults are among them.
    """

    kind: str
    name: str
    action: str
    fields: tuple[FieldChange, ...]


def conditions_of(resource: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Type -> condition."""
    listed = (resource.get("status") or {}).get("conditions") or []
    return {str(one.get("type")): one for one in listed}


def read_state(resource: Mapping[str, Any]) -> ResourceState:
    """What a resource's status says, with message and reason where they belong."""
    kind, status = str(resource.get("kind")), resource.get("status") or {}
    conditions = conditions_of(resource)
    replicas = int((resource.get("spec") or {}).get("replicas") or 1)
    available = status.get("availableReplicas")
    holds = conditions.get("Ready", {}).get("status") == "True"
    if kind == "Model":
        own = conditions.get("ModelReady") or conditions.get("Ready") or {}
        state, reason = one_line(own.get("message")), one_line(own.get("reason"))
        holds = holds and state in {AVAILABLE, ""}
    else:
        failing = [one for one in conditions.values() if one.get("status") != "True" and one.get("type") != "Ready"]
        state = ", ".join(f"{one.get('type')} {one.get('status')}" for one in failing)
        words = [one_line(one.get(key)) for one in failing for key in ("reason", "message")]
        reason = "; ".join(dict.fromkeys(word for word in words if word))
        holds = holds and not failing
    return ResourceState(
        kind=kind,
        name=str(resource["metadata"]["name"]),
        ready=kind in WITHOUT_READINESS or (holds and (available is None or int(available) >= replicas)),
        state=state,
        reason=reason,
        replicas=replicas,
        available_replicas=None if available is None else int(available),
        server=_server_of(status),
    )


def is_stale(resource: Mapping[str, Any], applied: Applied) -> bool:
    """Whether a status may be of before what was applied.

    An operator that sets ``observedGeneration`` says so itself. Core 2's does not: its status counts where the resource
    was made anew (and the condition is no older than it is), and after a change once the ``Ready`` condition is
    another than it was.
    """
    observed = (resource.get("status") or {}).get("observedGeneration") or 0
    if observed:
        return int(observed) < applied.generation
    ready = conditions_of(resource).get("Ready", {})
    # Kubernetes writes all times in UTC and in the same form, so they sort as text.
    since, made = ready.get("lastTransitionTime"), resource["metadata"].get("creationTimestamp")
    if since and made and since < made:
        return True
    return applied.before is not None and ready == applied.before


def changes_between(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> tuple[FieldChange, ...]:
    """The fields of labels and spec that differ, in order of their paths."""

    def told(resource: Mapping[str, Any] | None) -> dict[str, Any]:
        known = resource or {}
        labels = {f"metadata.labels[{key}]": text for key, text in labels_on(known).items()}
        return {**labels, **dict(_leaves("spec", known.get("spec") or {}))}

    old, new = told(before), told(after)
    paths = sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))
    return tuple(FieldChange(path=path, before=old.get(path), after=new.get(path)) for path in paths)


def labels_on(resource: Mapping[str, Any]) -> Mapping[str, str]:
    """The labels on a resource, or on a manifest."""
    return (resource.get("metadata") or {}).get("labels") or {}


def capabilities_of(server: Mapping[str, Any]) -> set[str] | None:
    """What a Server can run: its own list, or its configuration's with what it adds; None where that is not known."""
    spec = server.get("spec") or {}
    if own := spec.get("capabilities"):
        return set(own)
    stock = STOCK_CAPABILITIES.get(str(spec.get("serverConfig")))
    return None if stock is None else set(stock) | set(spec.get("extraCapabilities") or [])


def lacking_in(server: Mapping[str, Any], needed: Collection[str]) -> list[str]:
    """The capabilities that a Server is known not to have."""
    known = capabilities_of(server)
    return [] if known is None else sorted(set(needed) - known)


def image_of(resource: Mapping[str, Any] | None, server: str) -> str | None:
    """The image that a Server or ServerConfig gives the container of this name; None where it gives none."""
    containers = (((resource or {}).get("spec") or {}).get("podSpec") or {}).get("containers") or []
    return next((str(one["image"]) for one in containers if one.get("name") == server and one.get("image")), None)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    # Lists are compared whole: an entry that moved is a change of all after it.
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _leaves(f"{path}.{key}", below)
    else:
        yield path, value


def _server_of(status: Mapping[str, Any]) -> str:
    # The operator writes where a model has landed as the selector of its pods.
    selector = dict(part.partition("=")[::2] for part in str(status.get("selector") or "").split(","))
    return selector.get("server", "")
