"""Which model a reply came from, by what the reply says of itself.

A V2 reply names the model and version that made it, and Seldon Core 2 adds the header ``x-seldon-route``. On Core 2 the
model in the reply is the internal ``<model>_<n>``, where n counts the model's versions.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from profiles.load.payloads import HEADER_LENGTH
from profiles.load.transports import ROUTE
from registry.records import Target

_ROUTED_BY = frozenset({"seldon-model", "seldon-internal-model"})
_OF_MANY = (".experiment", ".pipeline")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answerer:
    """What one reply says of who made it; empty where it says nothing.

    Attributes:
        model: the model's name in the reply.
        version: its version there.
        route: the header ``x-seldon-route`` (``:<model>_<n>:``), where it was looked at.
    """

    model: str
    version: str
    route: str = ""


def answerer_of(body: bytes, headers: Mapping[str, str], target: Target) -> Answerer:
    """Who made a reply.

    Args:
        body: the reply as it came; one that is no V2 reply says nothing.
        headers: those that the transport kept.
        target: says the protocol.
    """
    try:
        model, version = _of_grpc(body) if target.protocol == "grpc" else _of_rest(body, headers)
    except Exception:
        # Foreign bytes can break a foreign parser in any way; whether they are an answer is judged elsewhere.
        model = version = ""
    return Answerer(model=model, version=version, route=headers.get(ROUTE, ""))


def find_stranger(answerers: Iterable[Answerer], target: Target) -> str | None:
    """What is wrong where a reply was made by another model than the one asked, or by two versions of it.

    Plain servers name the model that was asked. Where requests are routed (by the header ``seldon-model``, or where
    replies carry a route), the internal name ``<model>_<n>`` is right too. What an experiment or a pipeline answers may
    come from any of its models.

    Args:
        answerers: of the replies of one window.
        target: what was asked.
    """
    headers = {name.lower(): value for name, value in target.headers.items()}
    if any(headers.get(name, target.model).endswith(_OF_MANY) for name in _ROUTED_BY):
        return None
    seen = set(answerers)
    routed = bool(_ROUTED_BY & set(headers)) or any(one.route for one in seen)
    asked = {target.model, headers.get("seldon-model", target.model)}
    own = re.compile("|".join(rf"{re.escape(name)}{'(_[0-9]+)?' if routed else ''}" for name in sorted(asked)))
    names = {name for one in seen for name in (one.model, *one.route.split(":")) if name}
    if strangers := sorted(name for name in names if not own.fullmatch(name)):
        return f"answered by {', '.join(map(repr, strangers))}, not {target.model!r}"
    for what in (
        {name for name in names if name not in asked},
        {one.version for one in seen if one.version},
    ):
        if len(what) > 1:
            return f"answered by several versions of {target.model!r}: {', '.join(sorted(what))}"
    return None


def _of_grpc(body: bytes) -> tuple[str, str]:
    from tritonclient.grpc import service_pb2

    reply = service_pb2.ModelInferResponse.FromString(body)
    return reply.model_name, reply.model_version


def _of_rest(body: bytes, headers: Mapping[str, str]) -> tuple[str, str]:
    length = {name.lower(): value for name, value in headers.items()}.get(HEADER_LENGTH.lower())
    reply = json.loads(body if length is None else body[: int(length)])
    return str(reply.get("model_name") or ""), str(reply.get("model_version") or "")
