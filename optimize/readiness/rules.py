"""What a rule is, what it finds, and what a model is checked for."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from optimize.readiness.graph import Graph
from optimize.readiness.profile import Profile
from optimize.readiness.releases import Version

Severity = Literal["error", "warning", "info"]
Precision = Literal["float32", "float16", "bfloat16", "int8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a model is checked for.

    Attributes:
        tensorrt: the version of TensorRT, as (major, minor).
        profile: the shapes that an engine is to be built for, or None where nothing is said of them.
        precision: what the engine is to compute in, or None where nothing is said of it.
        max_batch_size: of the server, or None where nothing is said of it.
        config: Triton's configuration of the model (a ``ModelConfig``), or None where nothing is said of it.
    """

    tensorrt: Version
    profile: Profile | None = None
    precision: Precision | None = None
    max_batch_size: int | None = None
    config: Any = None

    @property
    def provider(self) -> Mapping[str, str] | None:
        """Settings of ONNX Runtime's TensorRT provider; None where the configuration does not ask for it."""
        if self.config is None:
            return None
        given = self.config.optimization.execution_accelerators.gpu_execution_accelerator
        return next((dict(one.parameters) for one in given if one.name == "tensorrt"), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """One thing that a rule found.

    Attributes:
        message: what is wrong, with the value that is wrong.
        nodes: names of the nodes, tensors or inputs it concerns.
        severity: where it is milder than the rule's.
    """

    message: str
    nodes: tuple[str, ...] = ()
    severity: Severity | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A static rule.

    Attributes:
        id: ``E101``, ...; it never changes its meaning.
        severity: an error stops the build or changes its meaning; a warning costs speed or accuracy.
        title: what is wrong, in a few words.
        fix: what to do.
        since: the first version of TensorRT that it holds for.
        check: what finds it.
        partitions: whether ONNX Runtime's TensorRT provider leaves the nodes to another one, which costs speed only.
    """

    id: str
    severity: Severity
    title: str
    fix: str
    check: Callable[[Graph, Target], Iterable[Hit]] = field(repr=False)
    since: Version = (10, 0)
    partitions: bool = False

    def severity_of(self, hit: Hit, target: Target) -> Severity:
        """How grave a hit is for this target."""
        severity = hit.severity or self.severity
        return "warning" if severity == "error" and self.partitions and target.provider is not None else severity

    @property
    def versions(self) -> str:
        """The versions it holds for, as people write them."""
        return f"{self.since[0]}.{self.since[1]} on"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A rule, what it found in a model, and what to do about it."""

    rule: str
    severity: Severity
    versions: str
    message: str
    nodes: tuple[str, ...]
    fix: str


def apply_rules(rules: Iterable[Rule], graph: Graph, target: Target) -> tuple[Finding, ...]:
    """What the rules for the target's version find, errors first, then by id."""
    found = [
        Finding(
            rule=rule.id,
            severity=rule.severity_of(hit, target),
            versions=rule.versions,
            message=hit.message,
            nodes=hit.nodes,
            fix=rule.fix,
        )
        for rule in rules
        if rule.since <= target.tensorrt
        for hit in rule.check(graph, target)
    ]
    rank: dict[Severity, int] = {"error": 0, "warning": 1, "info": 2}
    return tuple(sorted(found, key=lambda finding: (rank[finding.severity], finding.rule)))
