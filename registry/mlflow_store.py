"""How MLflow's store is reached: MLflow imported quietly, patience, many calls at once, and failures with a name."""

import errno
import logging
import os
import re
import socket
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

# Read by MLflow while it is imported: nothing phones home, and nothing but the command's answer goes to stdout.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

with warnings.catch_warnings():
    # Of MLflow's own type hints, while it is imported.
    warnings.filterwarnings("ignore", message=".*Any type hint is inferred", category=UserWarning)
    import mlflow
    import mlflow.onnx
    import mlflow.pyfunc
from mlflow import MlflowClient
from sqlalchemy import Engine, create_engine

from registry.errors import BurnishError, InputError, MissingExtraError, UnreachableError
from registry.tracking import redact, without_secrets

ABSENT = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"})
"""Codes with which MLflow says that something is not there."""

T = TypeVar("T")
R = TypeVar("R")

CHECK_TIMEOUT_S = 5
# MLflow's own are 7 retries that wait up to two minutes each.
RETRIES = 3
BACKOFF_FACTOR = 1
# A server that is slow to answer has many calls to answer at a time; SQLite takes one writer.
AT_ONCE = 8
MOST_SHOWN_CHARS = 400
# Where a database listens if its URI names no port.
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
# Who raises when a store is not there, refuses, or is full. What requests and urllib3 raise is mostly an OSError.
_OF_STORES = frozenset(
    {"mlflow", "sqlalchemy", "requests", "urllib3", "botocore", "boto3", "s3transfer", "google", "azure", "databricks"}
)
_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
_FULL = re.compile(r"no space left|dis[ck] is full|dis[ck] full|quota exceeded", re.IGNORECASE)
_STATUS = re.compile(r"too many (\d{3}) error responses|error code (\d{3}) !=|\b(\d{3}) (?:Client|Server) Error")
_REQUEST = re.compile(r"API request to (\S+) failed with exception .*\(Caused by (.+)\)$")
_WORDS = (
    (re.compile(r"UNAUTHENTICATED|not authenticated|locate credentials|password authentication failed"), 401),
    (re.compile(r"NoSuchBucket"), 404),
    (re.compile(r"PERMISSION_DENIED|AccessDenied|Forbidden|SignatureDoesNotMatch|InvalidAccessKeyId"), 403),
)
_CREDENTIALS = "MLflow takes them from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"


def is_server(uri: str) -> bool:
    """Whether a tracking server stands between us and the database, and says where artifacts go."""
    return urlsplit(uri).scheme in {"http", "https", "databricks", ""}


@contextmanager
def named_failures(uri: str) -> Iterator[None]:
    """Turns what MLflow and its libraries raise into an `UnreachableError`: it names the store, not its secrets."""
    try:
        yield
    except BurnishError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not _of_a_store(error):
            raise
        raise _named(error, uri) from None  # the cause holds the URI with its password


def _of_a_store(error: Exception) -> bool:
    return any(kind.__module__.partition(".")[0] in _OF_STORES for kind in type(error).__mro__)


def _named(error: Exception, uri: str) -> UnreachableError:
    text = without_secrets(str(error), uri).strip()
    words, hint = _cause(error, text)
    shown = _REQUEST.sub(r"\1: \2", text.partition("\n")[0])
    if len(shown) > MOST_SHOWN_CHARS:
        shown = f"{shown[:MOST_SHOWN_CHARS]} ..."
    return UnreachableError(
        f"the tracking store {redact(uri)} cannot be used: {f'{words}: ' if words else ''}{shown}", hint=hint
    )


def _cause(error: Exception, text: str) -> tuple[str, str]:
    """What is the matter in a few words, empty where that is not known, and what to do about it."""
    if (isinstance(error, OSError) and error.errno in _FULL_ERRNOS) or _FULL.search(text):
        return "no space is left", "Make room there, or for temporary files here."
    status = _status(error, text)
    if status == 401:
        return "it does not know who asks (401)", f"Give credentials: {_CREDENTIALS}."
    if status == 403:
        return "it refuses these credentials (403)", f"Ask for the right to write, or give others: {_CREDENTIALS}."
    if status >= 500:
        return f"it fails ({status})", "Its log says why: a full disk or a database that is gone, say."
    if status >= 400:
        return f"it refuses ({status})", "Whoever runs it can say why."
    return "", "Start it or correct MLFLOW_TRACKING_URI; without that variable a store in the working folder is used."


def _status(error: Exception, text: str) -> int:
    """The status of HTTP that a failure stands for; 0 where it stands for none."""
    found = _STATUS.search(text)
    if found is not None:
        return int(next(group for group in found.groups() if group))
    code = str(getattr(error, "error_code", ""))
    return next((status for pattern, status in _WORDS if pattern.search(text) or pattern.search(code)), 0)


# --- patience ----------------------------------------------------------------------------------------------------


@contextmanager
def impatient() -> Iterator[None]:
    """MLflow's requests give up within seconds, not minutes; its settings are as before afterwards."""
    hurried = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(CHECK_TIMEOUT_S),
    }
    with _environment(hurried):
        yield


@contextmanager
def patient() -> Iterator[None]:
    """A server that went away in the middle is waited for some seconds; what the user set for MLflow stays."""
    settings = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(RETRIES),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": str(BACKOFF_FACTOR),
    }
    with _environment({name: value for name, value in settings.items() if name not in os.environ}):
        yield


@contextmanager
def _environment(changed: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def each(work: Callable[[T], R], items: Iterable[T], *, at_once: int) -> list[R]:
    """What ``work`` makes of each item, in their order; after a failure nothing more is begun.

    Raises:
        Exception: of the first item that failed.
    """
    if at_once == 1:
        return [work(item) for item in items]
    failed_one = threading.Event()

    def begin(item: T) -> R:
        # The others are cancelled a moment after that.
        if failed_one.is_set():
            raise CancelledError
        try:
            return work(item)
        except BaseException:
            failed_one.set()
            raise

    with ThreadPoolExecutor(at_once, thread_name_prefix="burnish-tracking") as pool:
        futures = [pool.submit(begin, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    for error in (future.exception() for future in futures if not future.cancelled()):
        if error is not None and not isinstance(error, CancelledError):
            raise error
    return [future.result() for future in futures]


# --- MLflow's ways -----------------------------------------------------------------------------------------------


def quieten() -> None:
    """MLflow's loggers say what is wrong, and nothing else."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It logs a traceback of what it raises.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def pages(ask: Callable[[str | None], Any]) -> Iterator[Any]:
    """All items of a search that answers in pages."""
    token: str | None = None
    while True:
        page = ask(token)
        yield from page
        token = page.token
        if not token:
            return


@contextmanager
def default_store(uri: str, *, needed: bool) -> Iterator[None]:
    """MLflow's default store is ``uri``, and what it was before afterwards.

    Without a server, MLflow looks a ``models:/`` source up in its default store, whatever the client's own is.
    """
    if not needed:
        yield
        return
    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


def make_database(path: Path) -> None:
    """Makes the embedded store whole or not at all: MLflow takes seconds to lay out its tables, and reads no half."""
    if path.exists():
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    MlflowClient(tracking_uri=f"sqlite:///{partial}").search_experiments(max_results=1)
    try:
        # Never over one that another process has made meanwhile, and may have written to.
        os.link(partial, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        partial.replace(path)
    partial.unlink(missing_ok=True)


def knock(uri: str) -> None:
    """Connects to the database once, because MLflow would try for minutes.

    Raises:
        InputError: the port is no number that a port may be, or the database's driver is not installed.
        OSError: nothing listens there.
        sqlalchemy.exc.SQLAlchemyError: the database refuses.
    """
    parts = urlsplit(uri)
    try:
        port = parts.port or _DATABASE_PORTS.get(parts.scheme.partition("+")[0])
    except ValueError:
        # The URI is not shown: what stands in the port's place may be half of a password.
        raise InputError(
            f"the port in the {parts.scheme} URI of the tracking store is no number",
            hint="In a password, '/', ':' and '@' are written %2F, %3A and %40.",
        ) from None
    if parts.hostname and port:
        socket.create_connection((parts.hostname, port), timeout=CHECK_TIMEOUT_S).close()
    engine = _engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def _engine(uri: str) -> Engine:
    try:
        return create_engine(uri)
    except ModuleNotFoundError as error:
        what = f"A tracking store of {urlsplit(uri).scheme}"
        if what.endswith("postgresql"):
            raise MissingExtraError(what, extra="postgres") from None
        raise InputError(f"{what} needs the package {error.name!r}", hint="Install it beside burnish.") from None
