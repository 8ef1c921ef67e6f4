"""What the Kubernetes API means when it refuses, in burnish's own errors."""

import http.client
import json
from collections.abc import Mapping
from typing import Any

from profiles.deploy.core2_candidates import one_line
from registry.errors import BurnishError, InputError, UnreachableError

_LEAST_PAUSE_S = 0.05
_RETRY_AFTER_S = 1.0


class ConflictError(InputError):
    """Somebody else has set a field.

    Attributes:
        managers: who has.
    """

    def __init__(self, message: str, *, managers: set[str], hint: str) -> None:
        super().__init__(message, hint=hint)
        self.managers = managers


def refusal(error: Any, verb: str, kind: str, name: str, *, host: str, path: Mapping[str, str]) -> BurnishError:
    """The error for an answer that is a refusal.

    Args:
        error: the client's ``ApiException``.
        verb: what was asked, as a Role names it.
        kind: of the resource.
        name: of the resource; empty where it was about all of a kind.
        host: address of the API server.
        path: group, version, namespace and plural of the kind.
    """
    resource, where = f"{path['plural']}.{path['group']}", f"in the namespace {path['namespace']}"
    asked, (status, said) = f"{verb} {kind} {name}".rstrip(), _said(error)
    made: BurnishError
    match error.status:
        case 401:
            made = UnreachableError(
                f"the Kubernetes API at {host} does not know who we are at {asked} (401): {said}",
                hint="The token has expired or is wrong: log in again, or renew the account's token.",
            )
        case 403:
            made = UnreachableError(
                f"this account may not {verb} {resource} {where} (403): {said}",
                hint=f"It needs a Role with the verb {verb} on {resource}.",
            )
        case 404 if (status.get("details") or {}).get("kind") == "namespaces":
            made = InputError(f"there is no namespace {path['namespace']}", hint="Name one that is there.")
        case 404:
            made = UnreachableError(
                f"the cluster at {host} has no resource {resource}/{path['version']}",
                hint="Install Core 2 there, with its custom resources, or name another context.",
            )
        case 409:
            made = _conflict(status, said, asked, path["namespace"])
        case 400 | 422:
            made = InputError(f"the Kubernetes API refused the {kind} {name} ({error.status}): {said}")
        case 429 | 503:
            made = UnreachableError(f"the Kubernetes API has no time for {asked} ({error.status}): {said}")
        case 0:
            made = UnreachableError(
                f"the Kubernetes API at {host} cannot be trusted: {said}",
                hint="The kubeconfig's certificate-authority has to have signed the server's certificate.",
            )
        case _:
            made = UnreachableError(f"the Kubernetes API failed at {asked} ({error.status}): {said}")
    return made


def is_absent(error: Any, name: str) -> bool:
    """Whether it is this resource that is not there, and not its kind or namespace."""
    details = _said(error)[0].get("details") or {}
    known = details.get("name") == name and details.get("kind") != "namespaces"
    return error.status == http.client.NOT_FOUND and known


def retry_after_s(error: Any) -> float | None:
    """How long the server wants to be left alone; None where a second call is no use."""
    asked = (error.headers or {}).get("Retry-After")
    if error.status not in {http.client.TOO_MANY_REQUESTS, http.client.SERVICE_UNAVAILABLE}:
        return None
    if asked is None or not str(asked).isdigit():
        return _RETRY_AFTER_S if error.status == http.client.TOO_MANY_REQUESTS else None
    return max(_LEAST_PAUSE_S, float(asked))


def _conflict(status: Mapping[str, Any], said: str, asked: str, namespace: str) -> BurnishError:
    causes = (status.get("details") or {}).get("causes") or []
    # A cause reads: conflict with "<manager>" [with subresource "status"] using <version>[ at <time>]
    taken = [(one_line(one.get("field")), str(one.get("message")).split('"')) for one in causes if one.get("field")]
    fields = {field: parts[1] for field, parts in taken if len(parts) > 1}
    if not fields:
        return UnreachableError(f"somebody else changed it at the time of {asked} in {namespace} (409): {said}")
    told = ", ".join(f"{manager} has set {field}" for field, manager in fields.items())
    return ConflictError(
        f"somebody else changed what {asked} in {namespace} is to set (409): {told}",
        managers=set(fields.values()),
        hint="Give the field back (kubectl apply without it), or delete the resource.",
    )


def _said(error: Any) -> tuple[Mapping[str, Any], str]:
    """(the Status object of an answer, or nothing, and its words on one line)."""
    try:
        status = json.loads(error.body or "")
    except (TypeError, ValueError):
        status = {}
    if not isinstance(status, dict):
        status = {}
    return status, one_line(status.get("message") or error.reason or "no reason given")
