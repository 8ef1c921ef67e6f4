"""The configuration of an Envoy that routes as Core 2's scheduler configures its own. Plain values, no processes.

What Core 2 does, and this does too: a request is routed by its header ``seldon-model`` (a model's name, or
``<experiment>.experiment``); Envoy tells the server behind it the version by ``seldon-internal-model``, and the caller
by ``x-seldon-route``; who sends that route back stays with the candidate of an experiment that it names; a mirror's
copies go through a listener of their own, because only a route can say anew which model is meant.

On Core 2 an agent stands before each server, and puts the name that the server knows into the path or the message.
Here there is none, so each cluster has a filter that does it (`RENAME`).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from profiles.deploy.core2_messages import Experiment, check_experiment
from profiles.deploy.local_ports import LOOPBACK
from profiles.load.transports import KEEP_ALIVE_S, ROUTE
from profiles.serving.naming import check_core2_name
from registry.errors import InputError

Config = dict[str, Any]
Protocol = Literal["rest", "grpc"]

MODEL = "seldon-model"
INTERNAL_MODEL = "seldon-internal-model"
FRONT = "front"
MIRROR = "mirror"
RETRIES = 5
"""How often Core 2 sends a request again that failed with a status of 5xx or could not be sent."""
RETRY_BASE = "0.500s"
RETRIES_AT_ONCE = 5
"""How many requests to one server Core 2 lets be sent again at the same time."""
# What Core 2's agent takes as one message.
BUFFER_BYTES = 1000 * 1024 * 1024
MAX_TOTAL_WEIGHT = 2**32 - 1
FLUSH_S = 0.25
"""How old its histograms may be when it is asked for them; elsewhere it is 5 s where nobody says otherwise."""

_TYPES = "type.googleapis.com/envoy."
_PREFIXES: Mapping[Protocol, str] = {"rest": "/v2", "grpc": "/inference.GRPCInferenceService"}
_SUFFIXES: Mapping[Protocol, str] = {"rest": "http", "grpc": "grpc"}
_PROTOCOLS: tuple[Protocol, ...] = ("rest", "grpc")
# It becomes part of a path and of a Lua string.
_SERVED_NAME = re.compile(r"[A-Za-z0-9_.-]{1,120}")

RENAME = """\
-- The name that the server knows, and the same as the last two fields of a message: of two values of one field,
-- protobuf keeps the later one, so that they take the place of the name and version that came.
local SERVED, FIELDS = "{served}", "{fields}"
local NAMED = {{
  ["/inference.GRPCInferenceService/ModelInfer"] = true,
  ["/inference.GRPCInferenceService/ModelMetadata"] = true,
  ["/inference.GRPCInferenceService/ModelReady"] = true,
}}
local function size_of(prefix)
  local a, b, c, d = prefix:byte(2, 5)
  return ((a * 256 + b) * 256 + c) * 256 + d
end
local function prefix_of(size)
  return string.char(0, math.floor(size / 16777216) % 256, math.floor(size / 65536) % 256,
    math.floor(size / 256) % 256, size % 256)
end
function envoy_on_request(handle)
  local headers = handle:headers()
  local path = headers:get(":path")
  local rest = path:match("^/v2/models/[^/?]+(.*)$")
  if rest then
    headers:replace(":path", "/v2/models/" .. SERVED .. (rest:gsub("^/versions/[^/?]+", "")))
    return
  end
  if not NAMED[path] then
    return
  end
  if (headers:get("grpc-encoding") or "identity") ~= "identity" then
    handle:respond({{[":status"] = "200", ["content-type"] = "application/grpc", ["grpc-status"] = "12",
      ["grpc-message"] = "compressed messages cannot be routed here"}})
    return
  end
  headers:remove("content-length")
  -- A message of gRPC has its size before it, in five bytes with a flag; the rest flows through as it comes.
  local held, left = "", nil
  for chunk in handle:bodyChunks() do
    local size = chunk:length()
    if size > 0 and left == nil then
      held = held .. chunk:getBytes(0, size)
      if #held < 5 then
        chunk:setBytes("")
      else
        left = size_of(held) - (#held - 5)
        local bytes = prefix_of(size_of(held) + #FIELDS) .. held:sub(6)
        chunk:setBytes(left == 0 and bytes .. FIELDS or bytes)
      end
    elseif size > 0 and left > 0 then
      left = left - size
      if left == 0 then
        chunk:setBytes(chunk:getBytes(0, size) .. FIELDS)
      end
    end
  end
end
"""
"""Puts the server's own name of the model where the caller wrote any; what Core 2's agent does. For `str.format`."""

NAME_BY_PATH = f"""\
-- A request over REST that says nowhere else which model it means says so by its path.
function envoy_on_request(handle)
  local headers = handle:headers()
  local named = headers:get("{MODEL}") or ""
  if named == "" and (headers:get("{ROUTE}") or "") == "" then
    local model = headers:get(":path"):match("^/v2/models/([^/?]+)")
    if model then
      headers:replace("{MODEL}", model)
    end
  end
end
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRoute:
    """A model that is served somewhere on this machine.

    Attributes:
        name: what callers call it, as on Core 2: small letters, digits and ``-``.
        http: port of its server for REST.
        grpc: port of its server for gRPC.
        served_as: its name on that server; None for the one that Core 2's agent gives it, see `internal`.
        version: Core 2's count of its versions.
        binary: whether its server takes binary tensors over REST (Triton does).
    """

    name: str
    http: int
    grpc: int
    served_as: str | None = None
    version: int = 1
    binary: bool = False

    @property
    def internal(self) -> str:
        """What Core 2 calls the version: ``<name>_<version>``."""
        return f"{self.name}_{self.version}"

    def cluster(self, protocol: Protocol) -> str:
        """Envoy's name of it, as on Core 2; its metrics carry it."""
        return f"{self.internal}_{_SUFFIXES[protocol]}"


def check_routes(models: Sequence[ModelRoute], experiments: Sequence[Experiment]) -> None:
    """Returns when Envoy can route to all of them.

    Raises:
        InputError: a name is none for Core 2 or is given twice, a port or version cannot be, or an experiment has a
            candidate or mirror that is none of the models, takes over another's default, or has weights that cannot
            be.
    """
    for model in models:
        _check_model(model)
    _refuse_twice([model.name for model in models], "model")
    _refuse_twice([experiment.name for experiment in experiments], "experiment")
    _refuse_twice([one.default for one in experiments if one.default is not None], "default of an experiment")
    names = {model.name for model in models}
    for experiment in experiments:
        _check_experiment(experiment, names)


def bootstrap(*, port: int, clusters: str, routes: str, mirror_routes: str) -> Config:
    """What Envoy is started with: two listeners, an interface to ask how it is, and files for all that may change.

    Args:
        port: of the front; 0 for a free one.
        clusters: path of the file with the servers.
        routes: path of the file with the front's routes.
        mirror_routes: path of the file with the routes of copies.
    """
    asked = ("/ready", "/listeners", "/stats")
    return {
        "node": {"id": "burnish", "cluster": "burnish"},
        "stats_flush_interval": f"{FLUSH_S}s",
        "admin": {"address": _address(0), "allow_paths": [{"prefix": path} for path in asked]},
        "dynamic_resources": {"cds_config": _from_file(clusters)},
        "static_resources": {
            "listeners": [
                _listener(FRONT, port, routes, filters=[_lua(NAME_BY_PATH)]),
                _listener(MIRROR, 0, mirror_routes, filters=[]),
            ]
        },
    }


def clusters_of(models: Iterable[ModelRoute], *, mirror_port: int) -> list[Config]:
    """The servers: each model's two, and the listener of the mirror's copies."""
    servers = [_cluster(model, protocol) for model in models for protocol in _PROTOCOLS]
    return [*servers, *(_server(_mirror_cluster(protocol), mirror_port, protocol) for protocol in _PROTOCOLS)]


def routes_of(models: Sequence[ModelRoute], experiments: Sequence[Experiment], *, retries: int = RETRIES) -> Config:
    """The front's routes: of each model, split where it is an experiment's default, and of each experiment.

    The arguments are those that `check_routes` lets pass.
    """
    known = {model.name: model for model in models}
    splits = {model.name: Experiment(name=model.name, weights={model.name: 100}) for model in models}
    splits |= {one.default: one for one in experiments if one.default is not None}
    splits |= {f"{one.name}.experiment": one for one in experiments}
    routes = chain.from_iterable(_routes(host, split, known, retries) for host, split in splits.items())
    return _route_config(FRONT, list(routes))


def mirror_routes_of(
    models: Sequence[ModelRoute], experiments: Sequence[Experiment], *, retries: int = RETRIES
) -> Config:
    """The routes of copies: what asked for an experiment, or for its default, goes to its mirror."""
    known = {model.name: model for model in models}
    routes = []
    for experiment in experiments:
        if experiment.mirror is not None:
            split = Experiment(name=experiment.name, weights={experiment.mirror[0]: 100})
            for host in (experiment.default, f"{experiment.name}.experiment"):
                routes += [_split(host, split, known, protocol, retries) for protocol in _PROTOCOLS if host is not None]
    return _route_config(MIRROR, routes)


def response(kind: Literal["cluster", "route"], resources: Sequence[Config], *, version: int) -> Config:
    """A file of resources, as Envoy's discovery would send them."""
    name = {"cluster": "cluster.v3.Cluster", "route": "route.v3.RouteConfiguration"}[kind]
    typed = [{"@type": f"{_TYPES}config.{name}", **resource} for resource in resources]
    return {"version_info": str(version), "resources": typed}


# --- checks ----------------------------------------------------------------------------------------------------


def _check_model(model: ModelRoute) -> None:
    check_core2_name(model.name, "Model")
    for what, value, most in (("REST port", model.http, 65535), ("gRPC port", model.grpc, 65535)):
        if not 0 < value <= most:
            raise InputError(f"the {what} of the model {model.name} is {value}", hint=f"It is 1 to {most}.")
    if model.version < 1:
        raise InputError(f"the version of the model {model.name} is {model.version}", hint="It is 1 or more.")
    if model.served_as is not None and not _SERVED_NAME.fullmatch(model.served_as):
        raise InputError(
            f"the model {model.name} is served under the name {model.served_as!r}",
            hint="Serve it under a name of letters, digits, _, . and -, at most 120 of them.",
        )


def _check_experiment(experiment: Experiment, models: set[str]) -> None:
    check_core2_name(experiment.name, "Experiment")
    check_experiment(experiment)
    if experiment.resource != "model":
        raise InputError(
            f"the experiment {experiment.name} splits pipelines, and there are none on one machine",
            hint="Pipelines need the Kafka of a Core 2.",
        )
    asked = [*experiment.weights, *([experiment.mirror[0]] if experiment.mirror else [])]
    if missing := [name for name in asked if name not in models]:
        raise InputError(
            f"the experiment {experiment.name} needs the model {missing[0]}, which is not served here",
            hint=f"Served are: {', '.join(sorted(models)) or 'none'}.",
        )
    if (total := sum(experiment.weights.values())) > MAX_TOTAL_WEIGHT:
        raise InputError(
            f"the weights of the experiment {experiment.name} come to {total}",
            hint="Use smaller ones, such as 90 and 10.",
        )


def _refuse_twice(names: Sequence[str], what: str) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"there are two of the {what} {twice[0]!r}", hint="Each may be there once.")


# --- routes ----------------------------------------------------------------------------------------------------


def _routes(host: str, split: Experiment, known: Mapping[str, ModelRoute], retries: int) -> list[Config]:
    """All routes of one value of ``seldon-model``; those that keep to a candidate come first."""
    kept = [_kept(host, known[name], protocol) for name in split.weights for protocol in _PROTOCOLS]
    # Core 2 takes a route back only where there is a choice.
    kept = kept if len(split.weights) > 1 else []
    return [*kept, *(_split(host, split, known, protocol, retries) for protocol in _PROTOCOLS)]


def _split(host: str, split: Experiment, known: Mapping[str, ModelRoute], protocol: Protocol, retries: int) -> Config:
    weights = [(known[name], weight) for name, weight in split.weights.items()]
    action: Config = {
        "weighted_clusters": {
            "clusters": [
                {
                    "name": model.cluster(protocol),
                    "weight": weight,
                    "request_headers_to_remove": [INTERNAL_MODEL],
                    "request_headers_to_add": [_header(INTERNAL_MODEL, model.internal)],
                    "response_headers_to_add": [_header(ROUTE, f":{model.internal}:")],
                }
                for model, weight in weights
            ]
        },
        "timeout": "0s",
    }
    if retries:
        action["retry_policy"] = {
            "retry_on": "5xx,connect-failure",
            "num_retries": retries,
            "retry_back_off": {"base_interval": RETRY_BASE},
        }
    if split.mirror is not None:
        fraction = {"numerator": split.mirror[1], "denominator": "HUNDRED"}
        action["request_mirror_policies"] = [
            {"cluster": _mirror_cluster(protocol), "runtime_fraction": {"default_value": fraction}}
        ]
    match = _match(host, protocol, {"name": ROUTE, "present_match": False})
    return {"name": f"{host}_{_SUFFIXES[protocol]}", "match": match, "route": action}


def _kept(host: str, model: ModelRoute, protocol: Protocol) -> Config:
    """The route of who sends back the route of a candidate."""
    sent_back = {"name": ROUTE, "string_match": {"contains": f":{model.internal}:"}}
    return {
        "name": f"{host}_{_SUFFIXES[protocol]}_{model.internal}",
        "match": _match(host, protocol, sent_back),
        "request_headers_to_add": [_header(INTERNAL_MODEL, model.internal), _header(MODEL, model.name)],
        "response_headers_to_add": [_header(ROUTE, f":{model.internal}:")],
        "route": {"cluster": model.cluster(protocol), "timeout": "0s"},
    }


def _match(host: str, protocol: Protocol, also: Config) -> Config:
    return {"prefix": _PREFIXES[protocol], "headers": [{"name": MODEL, "string_match": {"exact": host}}, also]}


def _header(name: str, value: str) -> Config:
    return {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


def _route_config(name: str, routes: list[Config]) -> Config:
    return {"name": name, "virtual_hosts": [{"name": name, "domains": ["*"], "routes": routes}]}


# --- servers and listeners -------------------------------------------------------------------------------------


def _mirror_cluster(protocol: Protocol) -> str:
    return f"{MIRROR}_{_SUFFIXES[protocol]}"


def _cluster(model: ModelRoute, protocol: Protocol) -> Config:
    served = model.served_as or model.internal
    fields = b"\x0a" + bytes([len(served)]) + served.encode() + b"\x12\x00"
    code = RENAME.format(served=served, fields="".join(f"\\{byte:03d}" for byte in fields))
    port = model.grpc if protocol == "grpc" else model.http
    return _server(
        model.cluster(protocol), port, protocol, filters=[_lua(code), _filter("upstream_codec", "UpstreamCodec")]
    )


def _server(name: str, port: int, protocol: Protocol, *, filters: Sequence[Config] = ()) -> Config:
    options: Config = {"@type": f"{_TYPES}extensions.upstreams.http.v3.HttpProtocolOptions"}
    if protocol == "grpc":
        options["explicit_http_config"] = {"http2_protocol_options": {}}
    else:
        options["explicit_http_config"] = {"http_protocol_options": {}}
        options["common_http_protocol_options"] = {"idle_timeout": f"{KEEP_ALIVE_S}s"}
    if filters:
        options["http_filters"] = list(filters)
    endpoint = {"endpoint": {"address": _address(port)}}
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "per_connection_buffer_limit_bytes": BUFFER_BYTES,
        "circuit_breakers": {"thresholds": [{"max_retries": RETRIES_AT_ONCE}]},
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
    }


def _listener(name: str, port: int, routes: str, *, filters: Sequence[Config]) -> Config:
    manager = {
        "@type": f"{_TYPES}extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        "codec_type": "AUTO",
        "generate_request_id": False,
        "rds": {"route_config_name": name, "config_source": _from_file(routes)},
        "http_filters": [*filters, _filter("router", "Router")],
    }
    return {
        "name": name,
        "address": _address(port),
        # Another process that listens on the port is an error then, and does not get half of the requests.
        "enable_reuse_port": False,
        "per_connection_buffer_limit_bytes": BUFFER_BYTES,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


def _lua(code: str) -> Config:
    return _filter("lua", "Lua", default_source_code={"inline_string": code})


def _filter(name: str, kind: str, **settings: Any) -> Config:
    typed = {"@type": f"{_TYPES}extensions.filters.http.{name}.v3.{kind}", **settings}
    return {"name": f"envoy.filters.http.{name}", "typed_config": typed}


def _address(port: int) -> Config:
    return {"socket_address": {"address": LOOPBACK, "port_value": port}}


def _from_file(path: str) -> Config:
    return {"path_config_source": {"path": path}, "resource_api_version": "V3"}
