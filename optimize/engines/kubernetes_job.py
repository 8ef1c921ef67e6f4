"""Campaigns as Jobs and RayJobs of Kubernetes: a file of the user's to manifests, each checked by a schema.

What is used of Jobs (https://kubernetes.io/docs/concepts/workloads/controllers/job/): one index for each campaign,
retries counted by index, exit codes that no retry changes, and pods that a node's drain took away counted as nothing.
"""

import base64
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from pydantic import ValidationError

from optimize.config import REGISTERED, CampaignConfig, ChampionConfig, load_campaign
from optimize.engines.job_config import JobConfig, PodConfig
from optimize.engines.rayjob_schema import RayJob
from optimize.packages import PackageNotFoundError, version
from registry.codec import digest
from registry.documents import load_document
from registry.errors import InputError, MissingExtraError

Manifest = dict[str, Any]

JOB, DIGEST = "burnish.job", "burnish.digest"
"""Labels of all that belongs to a job: its name, and what it was rendered from."""
CONTAINER = "burnish"
KUBERNETES = "1.31"
"""The oldest release that a manifest is checked against: retries by index are on by default since 1.29."""

_CONFIG = "/etc/burnish"
_WORK = "/var/lib/burnish"
_KEY = re.compile(r"[-._a-zA-Z0-9]{1,253}")  # of a ConfigMap
_CONFIG_MAP_BYTES = 1_000_000  # Kubernetes takes 1 MiB, names and base64 included
# No retry changes these: a bug, wrong input, no variant that meets the policy, a check that found something.
_FINAL_CODES = (1, 2, 3, 5)
_RAY = "2.60.0"
_RAY_AGENT_PORT = 52365


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """What is sent to a cluster.

    Attributes:
        jobs: the Job, or the RayJobs.
        config: the ConfigMap with the campaigns, that goes with the last of them.
        warnings: what may not be what was meant.
    """

    jobs: tuple[Manifest, ...]
    config: Manifest
    warnings: tuple[str, ...]

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """All of them, in the order that ``kubectl apply`` takes."""
        return (self.config, *self.jobs)


def render_file(path: Path) -> Rendered:
    """The manifests of a job's file.

    Raises:
        InputError: the file, or one that it names, cannot be used, or a manifest is not what Kubernetes takes.
    """
    return render(load_document(path, JobConfig), base=path.parent)


def render(config: JobConfig, *, base: Path) -> Rendered:
    """The manifests of a job.

    Args:
        config: the job.
        base: the folder that its paths are relative to.

    Raises:
        InputError: a file that is named cannot be used, or a manifest is not what Kubernetes takes.
        MissingExtraError: the schemas of Kubernetes are not installed.
    """
    campaigns = [_campaign(base / name, config) for name in config.campaigns]
    contents = _contents(config, base)
    mark = digest({"job": config.model_dump(mode="json"), "contents": {k: v.hex() for k, v in contents.items()}})
    labels = {
        "app.kubernetes.io/name": "burnish",
        "app.kubernetes.io/managed-by": "burnish",
        JOB: config.name,
        DIGEST: mark,
    }
    config_map = _config_map(f"{config.name}-{mark[:8]}", labels, contents)
    name = config_map["metadata"]["name"]
    if config.kind == "job":
        jobs = [_job(config, labels, name)]
    else:
        jobs = [_rayjob(config, labels, name, index) for index in range(len(campaigns))]
    for manifest in (config_map, *jobs):
        check_manifest(manifest)
    return Rendered(jobs=tuple(jobs), config=config_map, warnings=tuple(_warnings(config)))


def as_yaml(manifests: Iterable[Mapping[str, Any]]) -> str:
    """One YAML document after the other."""
    return yaml.safe_dump_all([dict(one) for one in manifests], sort_keys=False, width=120)


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Returns where a manifest is what its schema takes: Kubernetes' own, or for a RayJob `rayjob_schema`, ours.

    Raises:
        InputError: it is not.
        MissingExtraError: the schemas of Kubernetes are not installed.
    """
    if manifest.get("kind") != "RayJob":
        _check_by_kubernetes(manifest)
        return
    try:
        checked = RayJob.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"the RayJob is not what KubeRay takes (by burnish's own schema): {place}: {first['msg']}"
        ) from None
    cluster = checked.spec.rayClusterSpec
    for template in (cluster.headGroupSpec.template, *(group.template for group in cluster.workerGroupSpecs)):
        _check_by_kubernetes({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template.spec})


def _check_by_kubernetes(manifest: Mapping[str, Any]) -> None:
    try:
        import kubernetes_validate
    except ImportError as error:
        raise MissingExtraError("Checking manifests", extra="kubernetes") from error
    try:
        kubernetes_validate.validate(dict(manifest), KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        place = ".".join(map(str, error.path))
        raise InputError(f"the {manifest.get('kind')} is not what Kubernetes takes: {place}: {error.message}") from None
    except (kubernetes_validate.SchemaNotFoundError, KeyError, AttributeError) as error:
        raise InputError(f"there is no schema for {manifest.get('apiVersion')} {manifest.get('kind')}") from error


# --- what the campaigns read -----------------------------------------------------------------------------------------


def _campaign(path: Path, config: JobConfig) -> CampaignConfig:
    """A campaign whose files a container will find.

    Raises:
        InputError: it cannot be read, or names a file that will not be there.
    """
    campaign = load_campaign(path)
    beside = {PurePosixPath(file).name for file in config.files}
    mounted = [PurePosixPath(path) for path in (*(volume.path for volume in config.volumes), _WORK)]
    named = [source.location for source in campaign.sources if source.kind != "torch"]
    named += [file for source in campaign.sources for file in source.depends_on]
    named += [file for file in (campaign.samples.evaluation, campaign.samples.calibration) if file is not None]
    named += [file for file in (campaign.recipes, campaign.levels) if file is not None]
    champion = campaign.champion.work if isinstance(campaign.champion, ChampionConfig) else campaign.champion
    if champion is not None and not REGISTERED.fullmatch(champion):
        named.append(champion)
    for given in named:
        place = PurePosixPath(given)
        if str(place) in beside or any(place.is_relative_to(mount) for mount in mounted):
            continue
        raise InputError(
            f"{path}: no container has {given!r}",
            hint="Paths are those of the container: under the `path:` of one of the job's `volumes:`, or the name of "
            "one of its `files:`.",
        )
    uri = campaign.registry.tracking_uri
    if uri is not None:
        raise InputError(
            f"{path}: registry.tracking_uri stands in the way of the job's own tracking server",
            hint="Leave it out of the campaign; `mlflow:` or `mlflow_secret:` of the job says where results go.",
        )
    return campaign


def _contents(config: JobConfig, base: Path) -> dict[str, bytes]:
    """Name in the ConfigMap -> content: the campaigns by their index, and the files beside them."""
    contents = {f"campaign-{index}.yaml": base / name for index, name in enumerate(config.campaigns)}
    for file in config.files:
        name = PurePosixPath(file).name
        if name in contents or not _KEY.fullmatch(name):
            raise InputError(
                f"files: a ConfigMap cannot hold {name!r} beside the campaigns",
                hint="Name it with letters, digits, '-', '_' and '.', and not as campaigns are there: campaign-0.yaml.",
            )
        contents[name] = base / file
    read: dict[str, bytes] = {}
    for name, path in contents.items():
        if not path.is_file():
            raise InputError(f"files: nothing at {path}")
        read[name] = path.read_bytes()
    size = sum(len(content) * 4 // 3 for content in read.values())
    if size > _CONFIG_MAP_BYTES:
        raise InputError(
            f"the campaigns and files have {size / 1e6:.1f} MB together; a ConfigMap takes 1 MB",
            hint="Put the large ones on a volume, and name that under `volumes:`.",
        )
    return read


def _config_map(name: str, labels: Mapping[str, str], contents: Mapping[str, bytes]) -> Manifest:
    text: dict[str, str] = {}
    binary: dict[str, str] = {}
    for key, content in contents.items():
        try:
            text[key] = content.decode()
        except UnicodeDecodeError:
            binary[key] = base64.b64encode(content).decode()
    manifest = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "labels": dict(labels)},
        "immutable": True,
        "data": text,
    }
    return manifest | ({"binaryData": binary} if binary else {})


def _warnings(config: JobConfig) -> Iterable[str]:
    if config.work is None:
        yield (
            "no `work:` claim is named: a pod that is replaced begins its campaign anew"
            + ("." if config.store is None else ", but for the variants that are in the shared store.")
        )
    if config.gpus and "job-cpu" in config.image:
        yield f"GPUs are asked for, and the image {config.image} looks like the one for CPUs."


# --- manifests -------------------------------------------------------------------------------------------------------


def _job(config: JobConfig, labels: Mapping[str, str], config_map: str) -> Manifest:
    arguments = ["run", f"{_CONFIG}/campaign-$(BURNISH_INDEX).yaml", *_options(config, "$(BURNISH_INDEX)")]
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    container = {
        **_container(CONTAINER, config, config),
        "args": arguments,
        "env": [{"name": "BURNISH_INDEX", "valueFrom": index}, *_environment(config)],
    }
    completions = len(config.campaigns)
    final = {"containerName": CONTAINER, "operator": "In", "values": list(_FINAL_CODES)}
    spec = {
        "completionMode": "Indexed",
        "completions": completions,
        "parallelism": min(config.parallelism or completions, completions),
        "backoffLimitPerIndex": config.retries,
        "ttlSecondsAfterFinished": config.ttl_s,
        "activeDeadlineSeconds": config.deadline_s,
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailIndex", "onExitCodes": final},
            ]
        },
        "template": {
            "metadata": {"labels": dict(labels)},
            "spec": {"restartPolicy": "Never", **_pod(config, config, container, config_map)},
        },
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": config.name, "labels": dict(labels)},
        "spec": _without_none(spec),
    }


def _rayjob(config: JobConfig, labels: Mapping[str, str], config_map: str, index: int) -> Manifest:
    ray = config.ray
    command = ["burnish", "run", f"{_CONFIG}/campaign-{index}.yaml", *_options(config, str(index))]
    engine = [{"name": "BURNISH_ENGINE", "value": "ray"}, {"name": "RAY_ADDRESS", "value": "auto"}]
    # KubeRay's own probes call wget, which the image does not have.
    probe = {
        "tcpSocket": {"port": _RAY_AGENT_PORT},
        "initialDelaySeconds": 10,
        "periodSeconds": 5,
        "failureThreshold": 60,
    }
    probes = {"readinessProbe": probe, "livenessProbe": probe}

    def template(name: str, pod: PodConfig, *, env: list[Manifest]) -> Manifest:
        container = {**_container(name, config, pod), **probes, "env": [*env, *_environment(config)]}
        spec = _pod(config, pod, container, config_map)
        # A container that KubeRay starts has its own init, and its processes look for each other by their ids.
        spec.pop("shareProcessNamespace")
        return {"metadata": {"labels": dict(labels)}, "spec": spec}

    spec = {
        # To KubeRay a line for a shell; each word of it is quoted.
        "entrypoint": shlex.join(command),
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": config.ttl_s,
        "activeDeadlineSeconds": config.deadline_s,
        "backoffLimit": config.retries,
        "rayClusterSpec": {
            "rayVersion": ray.version or _ray_version(),
            "headGroupSpec": {
                # No task is placed beside the driver, which may have to measure itself. The operator asks the dashboard
                # how the job is, so that it has to listen on the pod's address.
                "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},  # noqa: S104
                "template": template("ray-head", config, env=engine),
            },
            "workerGroupSpecs": [
                {
                    "groupName": "workers",
                    "replicas": ray.workers,
                    "minReplicas": ray.workers,
                    "maxReplicas": ray.workers,
                    "rayStartParams": {},
                    "template": template("ray-worker", ray.worker, env=[]),
                }
            ],
        },
    }
    name = config.name if len(config.campaigns) == 1 else f"{config.name}-{index}"
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": dict(labels)},
        "spec": _without_none(spec),
    }


def _options(config: JobConfig, index: str) -> list[str]:
    level = [] if config.level is None else ["--level", config.level]
    return ["--work", f"{_WORK}/{config.name}/{index}", *level]


def _environment(config: JobConfig) -> list[Manifest]:
    tracking: Manifest = {"name": "MLFLOW_TRACKING_URI"}
    if config.mlflow_secret is not None:
        reference = {"name": config.mlflow_secret.name, "key": config.mlflow_secret.key}
        tracking["valueFrom"] = {"secretKeyRef": reference}
    else:
        tracking["value"] = config.mlflow
    store = [] if config.store is None else [{"name": "BURNISH_STORE", "value": config.store}]
    given = [{"name": name, "value": value} for name, value in sorted(config.environment.items())]
    return [tracking, *store, {"name": "PYTHONUNBUFFERED", "value": "1"}, *given]


def _container(name: str, config: JobConfig, pod: PodConfig) -> Manifest:
    resources: Manifest = {"cpu": pod.cpu, "memory": pod.memory}
    if pod.gpus:
        resources["nvidia.com/gpu"] = pod.gpus
    mounts: list[Manifest] = [
        {"name": "config", "mountPath": _CONFIG, "readOnly": True},
        {"name": "work", "mountPath": _WORK},
        {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108 (the pod's own)
    ]
    for number, volume in enumerate(config.volumes):
        mounts.append({"name": f"volume-{number}", "mountPath": volume.path, "readOnly": volume.read_only})
    return {
        "name": name,
        "image": config.image,
        "envFrom": [{"secretRef": {"name": secret}} for secret in config.secrets],
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": mounts,
    }


def _pod(config: JobConfig, pod: PodConfig, container: Manifest, config_map: str) -> Manifest:
    work = {"emptyDir": {}} if config.work is None else {"persistentVolumeClaim": {"claimName": config.work}}
    volumes: list[Manifest] = [
        {"name": "config", "configMap": {"name": config_map}},
        {"name": "work", **work},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": config.shared_memory}},
    ]
    for number, volume in enumerate(config.volumes):
        claim = {"claimName": volume.claim, "readOnly": volume.read_only}
        volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": claim})
    spec = {
        "containers": [container],
        "terminationGracePeriodSeconds": config.grace_s,
        # The pause container takes away what servers leave when they are killed.
        "shareProcessNamespace": True,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "fsGroup": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "automountServiceAccountToken": config.service_account is not None,
        "serviceAccountName": config.service_account,
        "imagePullSecrets": [{"name": name} for name in config.pull_secrets] or None,
        "nodeSelector": dict(pod.node_selector) or None,
        "tolerations": [one.model_dump(exclude_none=True) for one in pod.tolerations] or None,
        "volumes": volumes,
    }
    return _without_none(spec)


def _ray_version() -> str:
    try:
        return version("ray")
    except PackageNotFoundError:
        return _RAY


def _without_none(spec: Mapping[str, Any]) -> Manifest:
    return {key: value for key, value in spec.items() if value is not None}
