"""The Cluster port: deploy a candidate, look at it, take it away."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from registry.records import Artifact, Candidate, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a deployment has used so far.

    Attributes:
        cpu_s: CPU seconds of all its processes, user and system, since they started; None where that is not known.
        rss_mb: resident memory of all its processes now, in MB of 10^6 bytes; None where that is not known.
        instance: what tells this life of the server from the next, after a restart or an eviction; empty where that
            is not known.
        peak_rss_mb: the most that each of its processes has had resident since it started (``VmHWM``), summed: no
            less than what they had together at any time, since they need not have peaked at once. None where the
            kernel does not tell.
        pids: of its processes.
    """

    cpu_s: float | None = None
    rss_mb: float | None = None
    instance: str = ""
    peak_rss_mb: float | None = None
    pids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Where a server tells how long it took for the requests to a model.

    Attributes:
        server: whose statistics they are: Triton's statistics extension, or MLServer's Prometheus metrics.
        address: ``host:port`` of Triton's REST, or of MLServer's metrics.
        model: its name there.
    """

    server: Literal["mlserver", "triton"]
    address: str
    model: str


class Deployment(Protocol):
    """One candidate that is being served."""

    @property
    def candidate(self) -> Candidate:
        """What is served."""

    @property
    def target(self) -> Target:
        """Where it is served."""

    @property
    def load_time_s(self) -> float:
        """From the request to load the model, on a server that runs, to its readiness."""

    @property
    def rendered(self) -> dict[str, str]:
        """Path in its folder -> text of the files that were rendered for it, as Core 2 would fetch them."""

    @property
    def statistics(self) -> Statistics | None:
        """Where its server tells of its own times; None where that cannot be asked from here."""

    def usage(self) -> Usage | None:
        """What it has used so far; None where that cannot be known from here.

        Raises:
            ServerDiedError: it is not served any more.
        """

    def undeploy(self) -> None:
        """Ends it; a second call does nothing."""


class Cluster(Protocol):
    """Where candidates are deployed."""

    def deploy(self, candidate: Candidate, artifact: Artifact, files: Path, *, timeout_s: float) -> Deployment:
        """Serves the candidate and returns when its model is ready.

        Args:
            candidate: what to serve, and how.
            artifact: its model.
            files: folder with the artifact's files; they are linked or copied, never changed.
            timeout_s: longest wait for readiness.

        Raises:
            UnreachableError: the server refused the model, or was not ready in time; the message ends with the end
                of the server's log.
            ServerDiedError: the server ended while it loaded.
        """

    def close(self) -> None:
        """Ends all that is deployed."""
