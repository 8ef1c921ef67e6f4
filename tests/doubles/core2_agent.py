"""A double of a Core 2 agent with a real MLServer behind it.

It is no Core 2. It fetches a folder (from this machine only), writes into the server's repository what an agent would
leave of it, and has the server load that, each with the reasons that a failure has.
"""

import contextlib
import http.client
import os
import shutil
import signal
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Any, Self

from profiles.deploy import core2_scheduler_pb2 as pb
from profiles.serving.roundtrip import agent_rewrite
from tests.doubles.ports import free_ports

LOOPBACK = "127.0.0.1"
START_S = 180.0


class AgentDouble:
    """One agent and its MLServer, with what Core 2 gives a server for its environment. A context manager.

    Attributes:
        http: REST port of the MLServer.
        grpc: gRPC port of it.
        log: what it wrote.
    """

    def __init__(self, folder: Path, **environment: str) -> None:
        self._repository = folder / "models"
        self._repository.mkdir(parents=True)
        self.log = folder / "server.log"
        self.http, self.grpc, metrics = free_ports(3)
        self._environment = {
            **os.environ,
            "MLSERVER_HOST": LOOPBACK,
            "MLSERVER_HTTP_PORT": str(self.http),
            "MLSERVER_GRPC_PORT": str(self.grpc),
            "MLSERVER_METRICS_PORT": str(metrics),
            "MLSERVER_METRICS_DIR": str(folder / "metrics"),
            "MLSERVER_LOAD_MODELS_AT_STARTUP": "false",
            "MLSERVER_GRPC_MAX_MESSAGE_LENGTH": "1048576000",
            "MLSERVER_DEBUG": "false",
            **environment,
        }

    def __enter__(self) -> Self:
        command = [str(Path(sysconfig.get_path("scripts")) / "mlserver"), "start", str(self._repository)]
        folder = self._repository.parent
        with self.log.open("wb") as log:
            self._server = subprocess.Popen(
                command, env=self._environment, stdout=log, stderr=log, cwd=folder, start_new_session=True
            )
        try:
            self._wait_until_live()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # Workers are in the same group; those that outlive the server would hold its files.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()

    def load(self, model: pb.Model, version: int) -> str:
        """Fetches, rewrites and loads a version; returns why it could not, or nothing."""
        spec = model.modelSpec
        source = Path(spec.uri)
        if not source.is_dir():
            return f"failed to copy {spec.uri}: directory not found"
        rewritten = agent_rewrite(
            source,
            "mlserver",
            name=model.meta.name,
            version=version,
            artifact_version=spec.artifactVersion if spec.HasField("artifactVersion") else None,
            parameters={one.name: one.value for one in spec.parameters},
            requirements=list(spec.requirements),
        )
        if rewritten.refused:
            return "; ".join(finding.message for finding in rewritten.findings)
        rewritten.lay_out(self._repository)
        return self._tell(rewritten.model, "load")

    def unload(self, model: pb.Model, version: int) -> None:
        """Unloads a version and removes its files."""
        name = f"{model.meta.name}_{version}"
        self._tell(name, "unload")
        shutil.rmtree(self._repository / name, ignore_errors=True)

    def _tell(self, name: str, what: str) -> str:
        import tritonclient.grpc
        from tritonclient.utils import InferenceServerException

        with tritonclient.grpc.InferenceServerClient(f"{LOOPBACK}:{self.grpc}") as client:
            work: Any = client.load_model if what == "load" else client.unload_model
            try:
                work(name)
            except InferenceServerException as error:
                code = (error.status() or "").rpartition(".")[2].title()
                return f"rpc error: code = {code} desc = {error.message()}"
        return ""

    def _wait_until_live(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._server.poll() is None:
            connection = http.client.HTTPConnection(LOOPBACK, self.http, timeout=2)
            try:
                connection.request("GET", "/v2/health/live")
                if connection.getresponse().status == http.client.OK:
                    return
            except (OSError, http.client.HTTPException):
                time.sleep(0.05)
            finally:
                connection.close()
        raise AssertionError(f"MLServer did not start:\n{self.log.read_text()[-2000:]}")
