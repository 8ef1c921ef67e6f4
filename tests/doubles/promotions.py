"""A registry, a place for manifests and a probe that live in memory, and end with whoever is killed."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from optimize.reporting import write_campaign, write_report
from profiles.deploy.rollout import ManifestRollout, owned
from profiles.pipelines.rollout import PipelineRollout
from profiles.serving.core2.manifests import Manifest, as_yaml
from registry import codec
from registry.errors import InputError, UnreachableError
from registry.policy import parse_policy
from registry.ports import RegisteredVersion
from registry.records import (
    Artifact,
    Campaign,
    Estimate,
    Observation,
    Policy,
    PromotionStep,
    Reign,
    ServingProfile,
    Variant,
)
from registry.store import FolderStore
from tests.doubles import campaigns
from tests.doubles.models import write_onnx

SAME = '[["x"],["y"]]'


def version(number: str, **changed: Any) -> RegisteredVersion:
    """A version that burnish registered."""
    told = RegisteredVersion(
        model="digits",
        version=number,
        fingerprint=f"fingerprint-{number}",
        candidate_id=f"candidate-{number}",
        candidate=f"int8 {number}",
        signature=SAME,
    )
    return replace(told, **changed)


@dataclass
class MemoryRegistry:
    """Versions 1 and 2 of ``digits``, of which the first is the champion.

    Attributes:
        down: whether it does not answer.
    """

    versions: dict[str, RegisteredVersion] = field(
        default_factory=lambda: {one.version: one for one in (version("1"), version("2"))}
    )
    named: dict[str, str] = field(default_factory=lambda: {"champion": "1"})
    kept: dict[str, Reign] = field(default_factory=dict)
    down: bool = False

    def find(self, model: str, *, campaign_id: str, candidate_id: str) -> RegisteredVersion | None:
        return next((one for one in self.versions.values() if one.candidate_id == candidate_id), None)

    def version(self, model: str, version: str) -> RegisteredVersion | None:
        self._answer()
        return self.versions.get(version)

    def aliases(self, model: str) -> Mapping[str, str]:
        self._answer()
        return dict(self.named)

    def set_alias(self, model: str, alias: str, version: str | None) -> None:
        self._answer()
        if version is None:
            self.named.pop(alias, None)
        elif version not in self.versions:
            raise InputError(f"{model} has no version {version}")
        else:
            self.named[alias] = version

    def crown(self, reign: Reign) -> None:
        self._answer()
        self.kept[f"{reign.since}.{reign.promotion_id}.{reign.how}"] = reign

    def reigns(self, model: str) -> tuple[Reign, ...]:
        return tuple(self.kept[key] for key in sorted(self.kept))

    def _answer(self) -> None:
        if self.down:
            raise UnreachableError("the registry is down")


@dataclass
class MemoryApplier:
    """What is in force, by kind and name.

    Attributes:
        failures: storage URI -> why a Model from there does not come about.
        down: whether nothing can be applied.
    """

    resources: dict[str, Manifest] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    down: bool = False
    location: str = "memory"

    def read(self, kind: str, name: str) -> Manifest | None:
        self._answer()
        return self.resources.get(f"{kind}/{name}")

    def apply(self, manifest: Manifest) -> None:
        self._answer()
        if told := self.failures.get(str(manifest["spec"].get("storageUri"))):
            raise UnreachableError(told)
        if manifest["kind"] == "Experiment":
            named = [one["name"] for one in manifest["spec"]["candidates"]]
            kind = manifest["spec"].get("resourceType", "model").capitalize()
            if missing := [one for one in named if f"{kind}/{one}" not in self.resources]:
                raise InputError(f"no {kind} {missing[0]}")
        if manifest["kind"] == "Pipeline":
            steps = [step["name"] for step in manifest["spec"]["steps"]]
            if missing := [one for one in steps if f"Model/{one}" not in self.resources]:
                raise UnreachableError(f"no Model {missing[0]}")
        self.resources[f"{manifest['kind']}/{manifest['metadata']['name']}"] = manifest

    def delete(self, kind: str, name: str) -> None:
        self._answer()
        self.resources.pop(f"{kind}/{name}", None)

    def replicas(self, model: str) -> int:
        found = self.read("Model", model)
        return 1 if found is None else int(found["spec"].get("replicas", 1))

    def is_scaled(self, model: str) -> bool:
        return False

    def exists(self, kind: str, name: str) -> bool:
        return self.read(kind, name) is not None

    def used_by(self, model: str) -> tuple[str, ...]:
        pipelines = [one for one in self.resources.values() if one["kind"] == "Pipeline"]
        named = {one["metadata"]["name"]: [step["name"] for step in one["spec"]["steps"]] for one in pipelines}
        return tuple(name for name, steps in named.items() if model in steps)

    def splits(self, model: str) -> tuple[str, ...]:
        return tuple(
            str(one["metadata"]["name"])
            for one in self.resources.values()
            if one["kind"] == "Experiment" and one["spec"].get("default") == model
        )

    def _answer(self) -> None:
        if self.down:
            raise UnreachableError("the cluster is down")


def model_manifest(name: str, uri: str, **spec: Any) -> Manifest:
    """A Model that serves what is at a URI."""
    return {
        "apiVersion": "mlops.seldon.io/v1alpha1",
        "kind": "Model",
        "metadata": {"name": name, "labels": owned("digits")},
        "spec": {"storageUri": uri, "requirements": ["mlserver", "burnish"], "replicas": 1, **spec},
    }


def production(applier: MemoryApplier, folder: Path, uri: str = "gs://models/old") -> str:
    """Puts a champion into production, and returns the text of its manifest, which has a comment of its own."""
    manifest = model_manifest("digits", uri, replicas=3)
    text = f"# by hand\n{as_yaml(manifest)}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Model-digits.yaml").write_text(text)
    applier.resources["Model/digits"] = manifest
    return text


def pipeline_manifest(name: str, *steps: str) -> Manifest:
    """A Pipeline of these Models, one after the other."""
    chain = [
        {"name": step, "inputs": [before] if before else []} for before, step in zip(("", *steps), steps, strict=False)
    ]
    return {
        "apiVersion": "mlops.seldon.io/v1alpha1",
        "kind": "Pipeline",
        "metadata": {"name": name, "labels": owned(name)},
        "spec": {"steps": chain, "output": {"steps": [steps[-1]]}},
    }


def pipeline_production(applier: MemoryApplier, folder: Path) -> str:
    """Puts a pipeline of ``tokens`` and ``encoder`` into production, and returns the text of its manifest."""
    manifest = pipeline_manifest("p", "tokens", "encoder")
    text = f"# by hand\n{as_yaml(manifest)}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Pipeline-p.yaml").write_text(text)
    applier.resources["Pipeline/p"] = manifest
    for name in ("tokens", "encoder"):
        applier.resources[f"Model/{name}"] = model_manifest(name, f"gs://models/{name}", replicas=3)
    return text


def pipeline_rollout(applier: Any, folder: Path) -> PipelineRollout:
    """The rollout of that pipeline with another encoder, which is brought."""
    return PipelineRollout(
        applier,
        production="p",
        folder=folder,
        models={"encoder": "encoder-int8"},
        brought={"encoder-int8": lambda: model_manifest("encoder-int8", "gs://models/encoder-int8")},
    )


def rollout(applier: Any, folder: Path, uri: str = "gs://models/new") -> ManifestRollout:
    """The rollout of a challenger from this URI."""
    return ManifestRollout(
        applier, production="digits", folder=folder, render=lambda name: model_manifest(name, uri, memory="64Mi")
    )


@dataclass
class StatedProbe:
    """Sees what it is told to.

    Attributes:
        p90_ms: of the challenger.
        failed: share of the challenger's requests.
        answered: in place of the counts that fit the step.
        watched: the steps so far.
        meanwhile: is called during each watch.
        more: metrics that it sees, too.
    """

    p90_ms: float = 10.0
    failed: float = 0.0
    answered: dict[str, int] | None = None
    watched: list[str] = field(default_factory=list)
    meanwhile: Callable[[PromotionStep], None] = lambda _: None
    more: frozenset[str] = frozenset()

    def sees(self, metric: str) -> bool:
        return metric in {"latency_p90_ms", "failed_share"} | self.more

    def watch(self, step: PromotionStep) -> Observation:
        self.watched.append(step.name)
        self.meanwhile(step)
        percent = 0 if step.action == "mirror" else step.percent
        split = {"challenger": percent * 10, "champion": 1000 - percent * 10, "others": 0}
        return Observation(
            watched_s=step.watch_s,
            challenger={"latency_p90_ms": told(self.p90_ms, "ms"), "failed_share": told(self.failed, "fraction")},
            champion={"latency_p90_ms": told(10.0, "ms")},
            answered=split if self.answered is None else self.answered,
        )


def told(value: float, unit: str) -> Estimate:
    """An estimate with a narrow interval."""
    return Estimate(value=value, low=value * 0.99, high=value * 1.01, runs=3, method="stated", unit=unit)


# --- campaigns that chose a model of their own ---------------------------------------------------------------------


def summing(offset: float, *, output: str = "sum") -> onnx.ModelProto:
    """``x`` (batch, 4) -> its sum (batch, 1), and the offset on top, which tells who answered."""
    graph = helper.make_graph(
        [
            helper.make_node("ReduceSum", ["x", "axes"], ["total"], keepdims=1),
            helper.make_node("Add", ["total", "offset"], [output]),
        ],
        "summing",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", 1])],
        [
            numpy_helper.from_array(np.array([1]), "axes"),
            numpy_helper.from_array(np.array([[offset]], np.float32), "offset"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def chosen_campaign(
    work: Path, offset: float, *, level: str = "standard", policy: Policy | None = None, output: str = "sum"
) -> Campaign:
    """A finished campaign in a working folder that chose a model which adds an offset, served by MLServer over gRPC."""
    files = work / "made" / f"{offset:g}"
    artifact = FolderStore(work).add(files, **_described(write_onnx(summing(offset, output=output), files)))
    name = f"adds-{offset:g}"
    made = replace(
        campaigns.FLOAT32,
        id=campaigns.sha(name + output)[:16],
        name=name,
        artifact=artifact,
        source_digest=artifact.digest,
    )
    serving = ServingProfile(server="mlserver", backend="burnish", protocol="grpc")
    found = finished_campaign(work, made, serving, level=level, policy=policy, sentence=f"it adds {offset:g}")
    write_report(found, work)
    return found


def finished_campaign(
    work: Path,
    made: Variant,
    serving: ServingProfile,
    *,
    level: str = "standard",
    policy: Policy | None = None,
    sentence: str = "it is the best",
    **changed: Any,
) -> Campaign:
    """A finished campaign in a working folder that has a variant's files, and chose it, served in some way."""
    name, files = made.name, FolderStore(work).path(made.artifact)
    one = replace(
        campaigns.BASELINE,
        id=campaigns.sha(f"{made.id} @")[:16],
        name=f"{name} @ {serving.key}",
        variant_id=made.id,
        variant_name=name,
        serving=serving,
    )
    whole = campaigns.campaign(level=level)
    verdict = replace(
        whole.verdict,
        policy=policy or parse_policy(["latency_p90_ms <= 60000"], "maximize max_throughput_rps"),
        baseline=one.id,
        selected=one.id,
        sentence=f"Serve {one.name}: {sentence}.",
        rejections=(),
        unknown=(),
        pareto=(one.id,),
    )
    told: dict[str, Any] = {"model_name": "sums", **changed}
    found = replace(
        whole,
        id=campaigns.sha(f"campaign {made.id}")[:16],
        name=name,
        variants=(made,),
        candidates=(one,),
        fidelities=(),
        screenings=(),
        capacities=(),
        rounds=(),
        measurements=(),
        comparisons=(),
        failures=(),
        rendered={},
        artifacts={made.id: str(files)},
        verdict=verdict,
        **told,
    )
    write_campaign(found, work)
    return found


def _described(artifact: Artifact) -> dict[str, Any]:
    return {
        "format": artifact.format,
        "entry": artifact.entry,
        "inputs": artifact.inputs,
        "outputs": artifact.outputs,
    }


class FileRegistry(MemoryRegistry):
    """The same, kept in a file, so that it outlives a process that is killed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        if path.is_file():
            told = json.loads(path.read_text())
            self.named = told["named"]
            self.kept = {key: codec.loads(text) for key, text in told["kept"].items()}

    def set_alias(self, model: str, alias: str, version: str | None) -> None:
        super().set_alias(model, alias, version)
        self._keep()

    def crown(self, reign: Reign) -> None:
        super().crown(reign)
        self._keep()

    def _keep(self) -> None:
        draft = self._path.with_suffix(".draft")
        kept = {key: codec.dumps(one) for key, one in self.kept.items()}
        draft.write_text(json.dumps({"named": self.named, "kept": kept}))
        draft.replace(self._path)
