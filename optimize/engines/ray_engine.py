"""The engine of a Ray cluster: an existing one by its address, or one that is started here, on loopback only.

Tasks and answers are JSON text; models and samples go through the shared store. A step whose worker or node dies is run
again elsewhere. Ray's own token of a cluster is found by Ray (``RAY_AUTH_TOKEN``, ``RAY_AUTH_TOKEN_PATH`` or
``~/.ray/auth_token``), and never looked at here.
"""

import ipaddress
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any, Self

from optimize.engines import ray_worker
from optimize.engines.cores import usable_cores
from optimize.engines.local import ChildFailure
from optimize.engines.performing import as_outcome, as_request
from optimize.engines.port import Begun, Outcome, Resources, Task, nobody
from optimize.packages import version
from registry.errors import BurnishError, InputError, MissingExtraError, UnreachableError
from registry.shared_store import SharedStore

_log = logging.getLogger(__name__)

RETRIES = 3
"""How often a task is run again whose worker or node died."""
_CONNECT_S = 5.0
_LOOK_S = 90.0
"""How long nodes have to run a first task; Ray takes some 20 s to notice that one has died."""
_SLOW_S, _SETTLING_S = 5.0, 0.2
_LOOPBACK = "127.0.0.1"
_NAMESPACE = "burnish"
_MARKS_S = 1.0
_OBJECT_STORE_BYTES = 80_000_000  # Ray's least is 75 MB, and nothing but short texts goes through it
_LOOPBACK_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


class RayEngine:
    """Implements `optimize.engines.port.Engine` on a Ray cluster. A context manager."""

    def __init__(self, store: SharedStore, *, address: str | None = None) -> None:
        """Connects to nothing yet.

        Args:
            store: shared by this machine and the nodes.
            address: ``host:port`` of the cluster's head, ``auto`` for the one that this machine is part of, or None to
                start one here.
        """
        self._store = store
        self._address = address
        self._ray: Any = None
        self._opened = ExitStack()
        self._nodes: list[Mapping[str, Any]] = []

    def __enter__(self) -> Self:
        """Connects, and looks at each node.

        Raises:
            MissingExtraError: Ray is not installed.
            InputError: the cluster has another version of Ray, Python or burnish.
            UnreachableError: there is no cluster at the address, or a node does not answer or cannot use the shared
                store.
        """
        with ExitStack() as opened:
            session = None
            if self._address is None:
                session = opened.enter_context(TemporaryDirectory(prefix="burnish-ray-", ignore_cleanup_errors=True))
            self._ray = _connect(self._address, session)
            opened.callback(self._ray.shutdown)
            self._nodes = [node for node in self._ray.nodes() if node["Alive"]]
            self._look_at_nodes()
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def nodes(self) -> int:
        """How many nodes there are."""
        return len(self._nodes)

    def check(self, name: str, resources: Resources) -> None:
        """Returns where some node has what a step needs; see `optimize.engines.port.Engine`.

        Raises:
            InputError: none has.
        """
        self._fitting(name, resources)

    def run(
        self, tasks: Iterable[Task], *, begun: Begun = nobody, meanwhile: Callable[[], None] | None = None
    ) -> Generator[Outcome, None, None]:
        """The outcome of each task, in the order in which they end; see `optimize.engines.port.Engine`.

        Args:
            tasks: to run.
            begun: told when one begins.
            meanwhile: called about once a second while they run.

        Raises:
            InputError: no node has what a task needs, or a task has code that is on this machine alone; said before any
                work begins.
            UnreachableError: the cluster was lost.
        """
        wanted = list(tasks)
        placed = [self._placed(task) for task in wanted]
        shared: dict[str, str] = {}
        waiting: dict[Any, Task] = {}
        # Ray's own waiting swallows what a handler of signals raises; that of a queue does not.
        ended: SimpleQueue[tuple[Any, Future[str]]] = SimpleQueue()
        marks = _Marks(begun)
        try:
            for task, resources in zip(wanted, placed, strict=True):
                reference = self._submit(task, resources, shared, marks.of(task))
                waiting[reference] = task
                reference.future().add_done_callback(partial(_put, ended, reference))
            while waiting:
                try:
                    reference, future = ended.get(timeout=_MARKS_S)
                except Empty:
                    marks.look(waiting.values())
                    if meanwhile is not None:
                        meanwhile()
                    continue
                yield self._outcome(waiting.pop(reference), future)
                marks.look(waiting.values())
        finally:
            for reference in waiting:
                self._ray.cancel(reference, force=True)
            marks.remove()

    # --- parts of it ---

    def _look_at_nodes(self) -> None:
        """Asks each node what it is; those that have gone are left out."""
        deadline, mark = time.monotonic() + _LOOK_S, f"look-{uuid.uuid4().hex}"
        self._store.tell(mark, b"seen")
        try:
            asked = [(node, self._ask(node, mark)) for node in self._nodes]
            self._nodes = []
            for node, future in asked:
                about = self._answer(node, future, mark, deadline)
                if about is not None:
                    _check_node(node["NodeManagerHostname"], about)
                    self._nodes.append(node)
        finally:
            with suppress(BurnishError):
                self._store.forget(mark)
        if not self._nodes:
            raise UnreachableError("all nodes of the Ray cluster have gone", hint="Run it again once there are some.")

    def _ask(self, node: Mapping[str, Any], mark: str) -> Future[str]:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        look = self._ray.remote(ray_worker.look)
        there = look.options(num_cpus=0, max_retries=0, scheduling_strategy=On(node["NodeID"], soft=False))
        future: Future[str] = there.remote(self._store.uri, mark).future()
        return future

    def _answer(
        self, node: Mapping[str, Any], future: Future[str], mark: str, deadline: float
    ) -> dict[str, Any] | None:
        """What a node says of itself; None where it has gone."""
        name, known, told = node["NodeManagerHostname"], self._ray.exceptions, False
        slow = time.monotonic() + _SLOW_S
        while True:
            try:
                return dict(json.loads(future.result(_SLOW_S)))
            except TimeoutError:
                why = "it has not run a first task"
            except (known.TaskUnschedulableError, known.NodeDiedError, known.WorkerCrashedError) as error:
                # One part of Ray knows sooner than the next of a node that has just come, or died.
                why = _last_line(error)
                time.sleep(_SETTLING_S)
                future = self._ask(node, mark)
            except (known.RayTaskError, known.RuntimeEnvSetupError) as error:
                raise InputError(
                    f"the node {name} of the Ray cluster cannot run burnish: {_last_line(error)}",
                    hint="Install the same burnish in the environment that Ray runs in there.",
                ) from None
            except known.RayError as error:
                raise UnreachableError(
                    f"the node {name} of the Ray cluster cannot be asked: {_last_line(error)}", hint="Run it again."
                ) from None
            if not self._is_there(node):
                _log.warning("the node %s of the Ray cluster has gone: nothing runs there", name)
                return None
            if time.monotonic() > deadline:
                raise UnreachableError(
                    f"the node {name} of the Ray cluster has not answered within {_LOOK_S:g} s: {why}",
                    hint="Look after it, or take it out of the cluster.",
                )
            if not told and time.monotonic() > slow:
                _log.warning("waiting for the node %s of the Ray cluster, which may have gone: %s", name, why)
                told = True

    def _is_there(self, node: Mapping[str, Any]) -> bool:
        """Whether Ray takes a node for alive."""
        return any(one["Alive"] and one["NodeID"] == node["NodeID"] for one in self._ray.nodes())

    def _placed(self, task: Task) -> Resources:
        """What a task asks Ray for, with a number of cores, where there is a node that has it."""
        if task.python_path is not None:
            raise InputError(f"{task.name} needs code in {task.python_path}, which nodes of a cluster do not have")
        fitting = self._fitting(task.name, task.resources)
        cores = task.resources.cores
        if cores is None:
            # A whole node, the smallest of those that fit, so that each of them can take it.
            cores = max(1, min(int(node["Resources"].get("CPU", 0)) for node in fitting))
        return replace(task.resources, cores=cores)

    def _fitting(self, name: str, resources: Resources) -> list[Mapping[str, Any]]:
        """The nodes that have what a step needs."""
        fitting = [node for node in self._nodes if _lacking(node, resources) is None]
        if not fitting:
            had = "; ".join(f"{node['NodeManagerHostname']}: {_told(node)}" for node in self._nodes[:5])
            raise InputError(
                f"no node of the Ray cluster has what {name} needs: {_wanted(resources)}",
                hint=f"There are {len(self._nodes)} nodes ({had}). Ask for less, or add one.",
            )
        return fitting

    def _submit(self, task: Task, resources: Resources, shared: dict[str, str], mark: str) -> Any:
        files = {}
        for name, path in task.files.items():
            if str(path) not in shared:
                shared[str(path)] = self._store.share_file(path)
            files[name] = shared[str(path)]
        whole = task.resources.cores is None
        request = {**as_request(task), "store": self._store.uri, "files": files, "whole": whole}
        request["resources"]["cores"] = resources.cores
        options: dict[str, Any] = {
            "name": task.name,
            "num_cpus": resources.cores,
            "max_retries": RETRIES,
            "retry_exceptions": False,
        }
        if resources.gpus:
            options["num_gpus"] = resources.gpus
        if resources.memory_mb is not None:
            options["memory"] = int(resources.memory_mb * 1e6)
        if resources.accelerator is not None:
            options["accelerator_type"] = resources.accelerator
        if resources.labels:
            options["label_selector"] = dict(resources.labels)
        return self._ray.remote(_work).options(**options).remote(json.dumps(request), mark)

    def _outcome(self, task: Task, future: Future[str]) -> Outcome:
        known = self._ray.exceptions
        try:
            told = json.loads(future.result())
        except known.RayTaskError:
            raise  # a bug: the worker's traceback is in it
        except known.OutOfMemoryError as error:
            words = f"{task.name} was stopped: its node had no memory left"
            return _lost(task, ChildFailure(words, kind="memory", log=str(error)))
        except (known.WorkerCrashedError, known.NodeDiedError, known.TaskUnschedulableError) as error:
            failure = ChildFailure(
                f"{task.name} was begun {RETRIES + 1} times, and its worker or node died each time",
                kind="died",
                log=_last_line(error),
            )
            return _lost(task, failure)
        except known.RayError as error:
            raise UnreachableError(f"the Ray cluster was lost: {_last_line(error)}", hint="Run it again.") from None
        return as_outcome(task, told, node=told["node"], host=told["host"])


def _put(ended: "SimpleQueue[tuple[Any, Future[str]]]", reference: Any, future: "Future[str]") -> None:
    ended.put((reference, future))


def _lost(task: Task, failure: ChildFailure) -> Outcome:
    return Outcome(task=task, result=None, error=failure, node="", host="", cpus=(), seconds=0.0)


# --- what has begun --------------------------------------------------------------------------------------------------


def _work(request: str, mark: str) -> str:
    """On a node: leaves a mark that a task has begun, and runs it."""
    from ray.experimental import internal_kv

    with suppress(Exception):  # it is only shown
        internal_kv._internal_kv_put(mark, f"{os.getpid()} {socket.gethostname()}", namespace=_NAMESPACE)
    return ray_worker.work(request)


class _Marks:
    """What workers leave in the cluster's own table when they begin a task, since Ray itself does not tell."""

    def __init__(self, begun: Begun) -> None:
        self._begun = begun
        self._prefix = f"{uuid.uuid4().hex}/"
        self._told: dict[str, str] = {}
        self._looked = 0.0

    def of(self, task: Task) -> str:
        """The key of a task."""
        return f"{self._prefix}{task.name}"

    def look(self, waiting: Iterable[Task]) -> None:
        """Tells of the tasks that have begun since the last look, where that was a while ago."""
        if self._begun is nobody or time.monotonic() - self._looked < _MARKS_S:
            return
        self._looked = time.monotonic()
        tasks = {self.of(task): task for task in waiting}
        for key, mark in self._read(tasks).items():
            if mark != self._told.get(key):
                self._told[key] = mark
                self._begun(tasks[key], mark.partition(" ")[2])

    def _read(self, wanted: Iterable[str]) -> dict[str, str]:
        """Key -> mark, of those that were left; none where the cluster does not answer, which it says by itself."""
        from ray.experimental import internal_kv as table

        try:
            there = set(table._internal_kv_list(self._prefix, namespace=_NAMESPACE))
            keys = [key for key in wanted if key.encode() in there]
            return {key: (table._internal_kv_get(key, namespace=_NAMESPACE) or b"").decode() for key in keys}
        except Exception:
            return {}

    def remove(self) -> None:
        """Takes the marks away, where the cluster is still there."""
        from ray.experimental import internal_kv

        with suppress(Exception):
            internal_kv._internal_kv_del(self._prefix, del_by_prefix=True, namespace=_NAMESPACE)


# --- nodes -----------------------------------------------------------------------------------------------------------


def _check_node(name: str, about: Mapping[str, Any]) -> None:
    """Returns where a node can do the work, by what it says of itself.

    Raises:
        InputError: it has another burnish.
        UnreachableError: it cannot use the shared store.
    """
    if about["burnish"] != version("burnish"):
        raise InputError(
            f"the node {name} has burnish {about['burnish']}, and this is {version('burnish')}",
            hint="Install the same one on all nodes.",
        )
    if "error" in about:
        raise UnreachableError(f"the node {name} cannot use the shared store: {about['error']}")


def _lacking(node: Mapping[str, Any], wanted: Resources) -> str | None:
    """What a node does not have of what a step needs, or None."""
    had, labels = node["Resources"], node.get("Labels") or {}
    for name, amount in (
        ("CPU", wanted.cores or 1),
        ("GPU", wanted.gpus),
        ("memory", (wanted.memory_mb or 0) * 1e6),
        (f"accelerator_type:{wanted.accelerator}", 0.001 if wanted.accelerator else 0),
    ):
        if amount and had.get(name, 0) < amount:
            return name
    return next((label for label, value in wanted.labels.items() if labels.get(label) != value), None)


def _wanted(wanted: Resources) -> str:
    parts = [f"{wanted.cores or 1} cores"]
    if wanted.memory_mb is not None:
        parts.append(f"{wanted.memory_mb:g} MB")
    if wanted.gpus:
        parts.append(f"{wanted.gpus:g} GPUs" + (f" of type {wanted.accelerator}" if wanted.accelerator else ""))
    parts += [f"{label}={value}" for label, value in wanted.labels.items()]
    return ", ".join(parts)


def _told(node: Mapping[str, Any]) -> str:
    had, labels = node["Resources"], node.get("Labels") or {}
    parts = [f"{had.get('CPU', 0):g} cores", f"{had.get('memory', 0) / 1e6:.0f} MB", f"{had.get('GPU', 0):g} GPUs"]
    parts += [f"{label}={value}" for label, value in labels.items() if label != "ray.io/node-id"]
    return ", ".join(parts)


# --- connecting ------------------------------------------------------------------------------------------------------


def check_address(address: str | None) -> str | None:
    """The host of a cluster's address, where something listens; None where no address has to be found.

    Raises:
        InputError: it is no address.
        UnreachableError: nothing listens there.
    """
    return None if address is None or address == "auto" else _reachable(address)


def _connect(address: str | None, session: str | None) -> Any:
    """Ray's module, connected; one that is started here has its files in the folder ``session``."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    host = check_address(address)
    if address is None or (host is not None and _is_loopback(host)):
        # Ray's servers listen on every interface, unless it may not be more than one machine; the switch has the name
        # of the systems where that is the default.
        os.environ[_LOOPBACK_SWITCH] = "0"
    try:
        import ray
        from ray._private import ray_constants
    except ImportError as error:
        raise MissingExtraError("Running on Ray", extra="ray") from error
    if os.environ.get(_LOOPBACK_SWITCH) == "0":
        ray_constants.ENABLE_RAY_CLUSTER = False  # for a Ray that was imported before
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options = {
            "address": "local",
            "num_cpus": len(usable_cores()),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "_temp_dir": session,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
    try:
        # What Ray says of workers that died it prints to stdout, which belongs to the answer of a command.
        ray._private.worker.print_to_stdstream = _to_log
        with _own_sigterm():
            context = ray.init(namespace=_NAMESPACE, **options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()  # else the next connection is told of this cluster's nodes
        raise _refused(address, error) from None
    if address is None and not _is_loopback(str(context.address_info["node_ip_address"])):
        ray.shutdown()
        raise UnreachableError("Ray would have listened beyond this machine, and was ended")
    return ray


def _to_log(said: Mapping[str, Any], **_: Any) -> None:
    for line in said.get("lines") or ():
        _log.info("Ray: %s", line)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """SIGTERM stays what it was: Ray would have it end the process with a code of its own."""
    previous = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        if callable(previous):
            previous(signal.SIGTERM, None)
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, previous)


def _reachable(address: str) -> str:
    """The host of an address where something listens."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not port.isdigit() or "/" in host or not host:
        raise InputError(
            f"{address!r} is no address of a Ray cluster",
            hint="Give host:port of its head (port 6379, usually), or auto.",
        )
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise UnreachableError(
            f"there is no Ray cluster at {address}: {error.strerror or error}",
            hint="Check host and port (ray status says them there), or leave the address out to start one here.",
        ) from None
    return host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refused(address: str | None, error: Exception) -> Exception:
    said = _last_line(error)
    if "ersion mismatch" in str(error):
        words = " ".join(str(error).split())
        return InputError(
            f"the Ray cluster at {address} does not fit: {words}",
            hint="Ray and Python have to be of the same versions.",
        )
    if address is None:
        return UnreachableError(f"Ray could not be started here: {said}")
    if address == "auto":
        return UnreachableError("there is no Ray cluster on this machine", hint="Name one by host:port, or start one.")
    return UnreachableError(f"the Ray cluster at {address} could not be joined: {said}")


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
