"""Candidates -> custom resources of Seldon Core 2, as plain values in a fixed order, and these as YAML.

Each function checks what it made (see `schema.check_manifest`). Fields that are not set are left out.
"""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import yaml

from profiles.serving.container import container_environment
from profiles.serving.core2.hardware import ANY_NODE, Hardware
from profiles.serving.core2.schema import AUTOSCALING, MLOPS, NEWEST, Core2Version, check_manifest
from profiles.serving.core2.sizing import MEBIBYTE, as_quantity, counted_copies, quantity_bytes
from profiles.serving.naming import check_core2_name
from profiles.serving.roundtrip import check_uri
from registry.errors import InputError
from registry.records import Candidate, ServingProfile

Manifest = dict[str, Any]

REQUIREMENTS: Mapping[str, tuple[str, ...]] = {
    "burnish": ("mlserver", "burnish"),
    "python": ("triton", "burnish"),
    "onnxruntime": ("onnx",),
    "openvino": ("openvino",),
}
"""Backend -> the capabilities its server must have, all of them.

On Core 2 ``onnx`` and ``openvino`` are Triton's own backends. ``burnish`` is ours: a server whose image has our
session, in our MLServer runtime or in Triton's Python backend.
"""
SELF_CONTAINED: Mapping[str, tuple[str, ...]] = {"burnish": ("mlserver", "python"), "python": ("triton", "python")}
"""Backend -> the capabilities that its server must have where our code is in the model's folder."""
STOCK_CAPABILITIES: Mapping[str, frozenset[str]] = {
    "mlserver": frozenset({
        "mlserver", "alibi-detect", "alibi-explain", "huggingface", "lightgbm", "mlflow", "python", "sklearn",
        "spark-mlib", "xgboost",
    }),
    "triton": frozenset({
        "triton", "dali", "fil", "onnx", "openvino", "python", "pytorch", "tensorflow", "tensorrt",
    }),
}  # fmt: skip
"""What the two Servers that Core 2 comes with can serve, by their names."""
KNOBS = ("max_batch_size", "max_batch_time", "threads")
"""Keys of our runtime's ``parameters.extra`` that are repeated in a Model's ``parameters``, to be turned there."""
METRIC = "infer_rps"
"""What the autoscaler asks the metrics adapter for: requests a second to one model."""


# --- resources -------------------------------------------------------------------------------------------------


def labels_of(candidate: Candidate, campaign_id: str) -> dict[str, str]:
    """What every resource of a candidate is found by."""
    return {
        "burnish.campaign": campaign_id,
        "burnish.candidate": candidate.id,
        "burnish.variant": candidate.variant_id,
    }


def model_parameters(candidate: Candidate, extra: Mapping[str, str]) -> dict[str, str]:
    """A Model's ``parameters``: the `KNOBS` among our runtime's; none for Triton, whose agent reads none."""
    return {key: extra[key] for key in KNOBS if key in extra} if candidate.serving.server == "mlserver" else {}


def render_model(
    name: str,
    candidate: Candidate,
    *,
    storage_uri: str,
    labels: Mapping[str, str],
    extra: Mapping[str, str] | None = None,
    memory_bytes: int | None = None,
    server: str | None = None,
    replicas: int = 1,
    min_replicas: int | None = None,
    max_replicas: int | None = None,
    secret_name: str | None = None,
    clean_topics: bool = False,
    requirements: Sequence[str] | None = None,
    version: Core2Version = NEWEST,
) -> Manifest:
    """The Model of a candidate.

    Args:
        name: its name, see `naming.model_name_of`.
        candidate: what is served, and how.
        storage_uri: where the agent fetches the folder from; another one for other bytes, since Core 2 does not look
            again under one it has.
        labels: see `labels_of`.
        extra: ``parameters.extra`` of the folder's model-settings.json; its `KNOBS` are repeated.
        memory_bytes: what all copies take together, or None where it was not measured.
        server: the one Server it may be scheduled to; None for any with the capabilities.
        replicas: always written: an autoscaler does nothing without it.
        min_replicas: with how many it counts as available; leave it out beside an autoscaler.
        max_replicas: the same.
        secret_name: the Kubernetes secret with the rclone remote.
        clean_topics: whether its Kafka topics go with it (since 2.10).
        requirements: the capabilities that its server must have; None for those of its backend.
        version: of Core 2.

    Raises:
        InputError: a name, URI or number that Core 2 does not take.
    """
    check_core2_name(name, "Model")
    check_storage_uri(storage_uri)
    serving = candidate.serving
    knobs = [{"name": key, "value": value} for key, value in model_parameters(candidate, extra or {}).items()]
    memory = None if memory_bytes is None else as_quantity(memory_bytes / counted_copies(serving))
    spec = {
        "storageUri": storage_uri,
        "requirements": list(requirements or REQUIREMENTS[serving.backend]),
        "memory": memory,
        "server": server,
        "replicas": replicas,
        "minReplicas": min_replicas,
        "maxReplicas": max_replicas,
        "parameters": knobs or None,
        "secretName": secret_name,
        "dataflow": {"cleanTopicsOnDelete": True} if clean_topics else None,
    }
    return _resource("Model", name, labels, spec, version)


def render_server(
    name: str,
    serving: ServingProfile,
    *,
    labels: Mapping[str, str],
    image: str | None = None,
    memory_bytes: int | None = None,
    hardware: Hardware = ANY_NODE,
    replicas: int = 1,
    max_replicas: int | None = None,
    server_config: str | None = None,
    stock_batching: bool = False,
    delete_volumes: bool = False,
    capabilities: Sequence[str] | None = None,
    version: Core2Version = NEWEST,
) -> Manifest:
    """A Server for one candidate, with the capabilities that its Model requires and no more.

    ``capabilities`` takes the place of the ServerConfig's, so that a Model for a runtime that the image lacks is not
    scheduled here.

    Args:
        name: see `naming.server_name_of`.
        serving: how the candidate is served.
        labels: see `labels_of`.
        image: of the server's container; None for the ServerConfig's, which has to hold our session where the
            backend is ours.
        memory_bytes: what the server takes with its model, asked for and not to be exceeded; None where it was not
            measured: then Core 2 goes by what the ServerConfig asks for.
        hardware: the nodes it wants; its CPU and memory go before what the profile and measurement say.
        replicas: as many as the Model's: a server holds one replica of a model.
        max_replicas: up to which Core 2 adds servers as Models ask for them.
        server_config: None for Core 2's own, ``mlserver`` or ``triton``.
        stock_batching: sets batching as MLServer's default for all its models: for runtimes other than ours, which
            Core 2 leaves no other way.
        delete_volumes: whether the models' volumes go with the Server (since 2.10).
        capabilities: what the Model requires; None for what its backend does.
        version: of Core 2.

    Raises:
        InputError: a name or number that Core 2 does not take, or an image without our session where it is needed.
    """
    check_core2_name(name, "Server")
    capabilities = capabilities or REQUIREMENTS[serving.backend]
    if "burnish" in capabilities and image is None and server_config is None:
        raise InputError(
            f"Core 2's own image for {serving.server} has no session of burnish's", hint="Name an image that has one."
        )
    env: dict[str, str | None] = {**container_environment(serving), "KMP_AFFINITY": hardware.kmp_affinity}
    agent: list[Manifest] = []
    if serving.server == "mlserver":
        env |= _stock_batching(serving) if stock_batching else {}
        if counted_copies(serving) > 1:
            # The agent multiplies a model's memory by what it finds in its own environment.
            agent = [{"name": "agent", "env": _env({"MLSERVER_PARALLEL_WORKERS": str(serving.parallel_workers)})}]
    container = {
        "name": serving.server,
        "image": image,
        "env": _env(env),
        "resources": _resources(serving, memory_bytes, hardware),
    }
    pods = {
        "containers": [_without_none(container), *agent],
        "nodeSelector": dict(hardware.node_selector) or None,
        "tolerations": [entry.model_dump(exclude_none=True) for entry in hardware.tolerations] or None,
    }
    policy = {"whenDeleted": "Delete", "whenScaled": "Delete"} if delete_volumes else None
    spec = {
        "serverConfig": server_config or serving.server,
        "capabilities": list(capabilities),
        "replicas": replicas,
        "minReplicas": None if max_replicas is None else replicas,
        "maxReplicas": max_replicas,
        "podSpec": _without_none(pods),
        "statefulSetPersistentVolumeClaimRetentionPolicy": policy,
    }
    return _resource("Server", name, labels, spec, version)


def render_server_config(
    name: str,
    installed: Mapping[str, Any],
    *,
    labels: Mapping[str, str],
    server: Literal["mlserver", "triton"],
    quiet: bool = True,
    models_bytes: int | None = None,
    version: Core2Version = NEWEST,
) -> Manifest:
    """The cluster's own ServerConfig under another name, with what no Server can change.

    A Server's podSpec adds to lists, so it cannot take an argument away, and it has no volumes. That is when a
    ServerConfig is needed: to rid Triton of ``--log-verbose=1``, and where models do not fit the volume (1 GiB). All
    else is kept as it is installed.

    Args:
        name: the new one's.
        installed: as ``kubectl get serverconfig NAME -o json`` gives it.
        labels: see `labels_of`.
        server: whose container is meant.
        quiet: whether ``--log-verbose`` goes.
        models_bytes: what the models take; the volume becomes twice that, since the agent keeps a copy while it loads.
        version: of Core 2.

    Raises:
        InputError: what is installed is no ServerConfig with this server, or has no volume for models.
    """
    check_core2_name(name, "ServerConfig")
    spec = copy.deepcopy(installed.get("spec")) if installed.get("kind") == "ServerConfig" else None
    containers = _named_containers(spec)
    if server not in containers or not isinstance(spec, dict):
        raise InputError(
            f"what is installed is no ServerConfig with a container {server!r}",
            hint=f"Give what `kubectl get serverconfig {server} -o json` prints.",
        )
    if quiet:
        for key in ("args", "command"):
            if isinstance(words := containers[server].get(key), list):
                containers[server][key] = [word for word in words if not str(word).startswith("--log-verbose")]
    if models_bytes is not None:
        _enlarge(spec, containers, 2 * models_bytes)
    spec.setdefault("volumeClaimTemplates", [])
    return _resource("ServerConfig", name, labels, spec, version)


def render_experiment(
    name: str,
    weights: Mapping[str, int],
    *,
    labels: Mapping[str, str],
    default: str | None = None,
    mirror: tuple[str, int] | None = None,
    resource_type: Literal["model", "pipeline"] = "model",
    version: Core2Version = NEWEST,
) -> Manifest:
    """A split of traffic.

    Args:
        name: the experiment's.
        weights: candidate -> weight; its share is its weight over the sum.
        labels: of the resource.
        default: the candidate whose endpoint the experiment takes over; without one it has an endpoint of its own.
        mirror: who gets a copy of the requests, and of how many percent.
        resource_type: what the names are of.
        version: of Core 2.

    Raises:
        InputError: a name is given twice, the default is no candidate, or a weight or percentage cannot be.
    """
    check_core2_name(name, "Experiment")
    spec = {
        "default": default,
        "candidates": [{"name": candidate, "weight": weight} for candidate, weight in weights.items()],
        "mirror": None if mirror is None else {"name": mirror[0], "percent": mirror[1]},
        "resourceType": resource_type,
    }
    return _resource("Experiment", name, labels, spec, version)


def render_pipeline(
    name: str, steps: Sequence[str], *, labels: Mapping[str, str], version: Core2Version = NEWEST
) -> Manifest:
    """A chain of models, each fed by the one before it; the last one's answers are the pipeline's.

    Raises:
        InputError: there is no step, one is named twice, or a name is none for Core 2.
    """
    check_core2_name(name, "Pipeline")
    if not steps or len(set(steps)) < len(steps):
        raise InputError(f"the steps of {name!r} are {', '.join(steps) or 'none'}", hint="Name each model once.")
    chain = [{"name": steps[0]}, *({"name": after, "inputs": [before]} for before, after in pairwise(steps))]
    return _resource("Pipeline", name, labels, {"steps": chain, "output": {"steps": [steps[-1]]}}, version)


def render_autoscaler(
    model: str,
    *,
    rate_rps: float,
    min_replicas: int,
    max_replicas: int,
    labels: Mapping[str, str],
    version: Core2Version = NEWEST,
) -> Manifest:
    """Kubernetes' autoscaler on a Model, by its requests a second, which the metrics adapter serves as `METRIC`.

    Args:
        model: the Model's name; the autoscaler's is the same.
        rate_rps: what one replica is to be given, see `rate_per_replica`.
        min_replicas: the fewest.
        max_replicas: the most.
        labels: of the resource.
        version: of Core 2; before 2.10 a Model's scale has no selector, without which no autoscaler works.

    Raises:
        InputError: the release has no such thing, or the numbers cannot be.
    """
    thousandths = math.floor(rate_rps * 1000) if math.isfinite(rate_rps) else 0
    if thousandths < 1:
        raise InputError(f"an autoscaler cannot hold replicas at {rate_rps} requests a second")
    model_reference = {"apiVersion": MLOPS, "kind": "Model", "name": model}
    # Not Value, which multiplies the present number by a ratio that a lagging metric keeps high, and overshoots.
    target = {"type": "AverageValue", "averageValue": f"{thousandths}m"}
    spec = {
        "scaleTargetRef": model_reference,
        "minReplicas": min_replicas,
        "maxReplicas": max_replicas,
        "metrics": [
            {
                "type": "Object",
                "object": {"metric": {"name": METRIC}, "describedObject": dict(model_reference), "target": target},
            }
        ],
    }
    return _resource("HorizontalPodAutoscaler", model, labels, spec, version)


def adapter_rules() -> Manifest:
    """Values for the chart of prometheus-adapter that serve `METRIC` for each Model; no resource of its own."""
    rule = {
        "seriesQuery": 'seldon_model_infer_total{namespace!="",model!=""}',
        "resources": {
            "overrides": {
                "model": {"group": "mlops.seldon.io", "resource": "model"},
                "namespace": {"resource": "namespace"},
            }
        },
        "name": {"as": METRIC},
        "metricsQuery": "sum by (<<.GroupBy>>) (rate(<<.Series>>{<<.LabelMatchers>>}[2m]))",
    }
    return {"rules": {"custom": [rule]}}


# --- where the folder is ---------------------------------------------------------------------------------------


def check_storage_uri(uri: str) -> None:
    """Returns when a Core 2 agent, which fetches with rclone, can make something of the URI.

    Raises:
        InputError: it cannot.
    """
    refused = [one for one in check_uri(uri) if one.severity == "error"]
    if refused:
        raise InputError(f"storageUri: {refused[0].message}", hint=refused[0].way)
    if re.search(r"\s", uri):
        raise InputError(f"storageUri: {uri!r} has a space in it", hint="Name a place without one.")


# --- YAML ------------------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, without aliases, and with text that begins like a number in quotes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    # YAML 1.1 and 1.2 do not agree on numbers: PyYAML writes 1e1234 bare, and Kubernetes would read a number.
    style = '"' if value[:1].isdigit() or value[:1] in {"+", "-", "."} else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def as_yaml(manifest: Mapping[str, Any]) -> str:
    """The manifest as YAML, in the order it was made in; the same for every reader of YAML 1.1 and 1.2."""
    return yaml.dump(dict(manifest), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


# --- parts -----------------------------------------------------------------------------------------------------


def _resource(
    kind: str, name: str, labels: Mapping[str, str], spec: Mapping[str, Any], version: Core2Version
) -> Manifest:
    metadata = {"name": name, "labels": dict(sorted(labels.items()))}
    api = AUTOSCALING if kind == "HorizontalPodAutoscaler" else MLOPS
    manifest = {"apiVersion": api, "kind": kind, "metadata": metadata, "spec": _without_none(spec)}
    check_manifest(manifest, version)
    return manifest


def _without_none(fields: Mapping[str, Any]) -> Manifest:
    return {key: value for key, value in fields.items() if value is not None}


def _env(variables: Mapping[str, str | None]) -> list[Manifest]:
    return [{"name": name, "value": value} for name, value in variables.items() if value is not None]


def _stock_batching(serving: ServingProfile) -> dict[str, str]:
    if serving.max_batch_size == 1:
        return {}
    seconds = f"{serving.max_batch_delay_ms / 1000:g}"
    return {"MLSERVER_MODEL_MAX_BATCH_SIZE": str(serving.max_batch_size), "MLSERVER_MODEL_MAX_BATCH_TIME": seconds}


def _resources(serving: ServingProfile, memory_bytes: int | None, hardware: Hardware) -> Manifest:
    copies = counted_copies(serving)
    # Each copy's share rounded up, as it is in the Model, or the Server would be some bytes too small for it.
    needed = (
        None if memory_bytes is None else as_quantity(copies * math.ceil(memory_bytes / copies / MEBIBYTE) * MEBIBYTE)
    )
    memory = hardware.memory or needed
    if memory and needed and quantity_bytes(memory) < quantity_bytes(needed):
        raise InputError(
            f"the hardware gives {memory} of memory; the model was measured to need {needed}",
            hint="Give it as much, or Core 2 will not schedule the model.",
        )
    # Limits as requests: what was measured had so much, and whole CPUs asked for so may be had exclusively.
    amounts = _without_none(
        {
            "cpu": hardware.cpu or str(serving.threads * copies),
            "memory": memory,
            "nvidia.com/gpu": str(hardware.gpus) if hardware.gpus else None,
        }
    )
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _named_containers(spec: Any) -> dict[str, Manifest]:
    pods = spec.get("podSpec") if isinstance(spec, dict) else None
    return {str(entry.get("name")): entry for entry in _listed(pods, "containers")}


def _listed(owner: Any, key: str) -> list[Manifest]:
    """The mappings in a list of foreign YAML, which may be anything."""
    entries = owner.get(key) if isinstance(owner, dict) else None
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _enlarge(spec: Manifest, containers: Mapping[str, Manifest], size_bytes: int) -> None:
    """Makes the volume of models so large, where it is smaller."""
    mounts = _listed(containers.get("agent"), "volumeMounts")
    volume = next((one.get("name") for one in mounts if str(one.get("mountPath")).rstrip("/") == "/mnt/agent"), None)
    claims = _listed(spec, "volumeClaimTemplates")
    claim = next((one for one in claims if volume and one.get("name") == volume), None)
    if claim is None or not isinstance(claim.get("spec"), dict):
        raise InputError("the installed ServerConfig has no volume claim that its agent mounts at /mnt/agent")
    requests = claim["spec"].setdefault("resources", {}).setdefault("requests", {})
    if quantity_bytes(str(requests.get("storage", "0"))) < size_bytes:
        requests["storage"] = as_quantity(size_bytes)
