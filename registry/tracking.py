"""Where campaigns are recorded: the user's tracking server, or a store in the working folder."""

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from registry.errors import InputError
from registry.ports import Tracker

_SECRET_IN_QUERY = re.compile(r"([?&][^=&]*(?:password|passwd|pwd|secret|token|key)[^=&]*=)[^&#]*", re.IGNORECASE)
HIDDEN = "***"
SECRET_VARIABLES = (
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "PGPASSWORD",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
)
"""Environment variables whose values no message shows."""
SECRET_NAME = re.compile(r"(?i)secret|password|passwd|token|credential|_key$|^AWS_ACCESS_KEY_ID$")
"""What the names of environment variables with secrets look like."""
_URL_IN_TEXT = re.compile(r"(?<=://)[^/\s@'\"]+@")
_QUERY_IN_TEXT = re.compile(r"([?&][^=&\s]*(?:password|passwd|pwd|secret|token|key)[^=&\s]*=)[^&#\s]*", re.IGNORECASE)
_SHORTEST_SECRET = 6  # "true" and "0" are no secrets, and would take parts of words away


def open_tracker(uri: str | None, work: Path) -> Tracker:
    """The tracker at ``uri``, else at ``MLFLOW_TRACKING_URI``, else a SQLite store in the folder ``work``.

    Nothing is connected or written yet; `Tracker.check` does that.
    """
    # MLflow takes seconds to import, and commands that record nothing need it not.
    from registry.mlflow_tracking import MlflowTracker

    return MlflowTracker(store_uri(uri, work), work)


def store_uri(uri: str | None, work: Path) -> str:
    """The store that `open_tracker` takes."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or embedded_uri(work)


def artifact_location(uri: str, tracking_uri: str | None = None) -> str:
    """Where MLflow keeps an artifact: ``s3://``, ``gs://``, a local path, or what only its server can read.

    Args:
        uri: ``runs:/<run id>/<path>``, ``models:/<name>/<version>``, ``models:/<name>@<alias>``, ``models:/<id>``, or
            ``mlflow-artifacts:``, which stays as it is.
        tracking_uri: of the store; None for ``MLFLOW_TRACKING_URI``.

    Raises:
        InputError: the URI is none of these or names nothing that is there, or no tracking store is named.
        UnreachableError: the tracking store does not answer.
    """
    if uri.startswith("mlflow-artifacts:"):
        return uri
    named = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not named:
        raise InputError(f"{uri} is MLflow's, and no tracking store is named", hint="Set MLFLOW_TRACKING_URI.")
    from registry.mlflow_tracking import MlflowTracker

    return MlflowTracker(named, Path()).artifact_location(uri)


def embedded_uri(work: Path) -> str:
    """The URI of the SQLite store inside the folder ``work``."""
    return f"sqlite:///{work.resolve() / 'mlflow.db'}"


def redact(uri: str) -> str:
    """The URI without its user, password and secret parameters, fit for a message or a log."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return HIDDEN
    scheme, _, rest = uri.partition("://")
    # A path alone may have an '@', too.
    shown = f"{scheme}://{HIDDEN}@{rest.rpartition('@')[2]}" if parts.netloc and "@" in rest else uri
    return _SECRET_IN_QUERY.sub(rf"\g<1>{HIDDEN}", shown)


def without_secrets(text: str, uri: str) -> str:
    """The text with every mention of the URI redacted, and all secrets hidden wherever they stand.

    Secrets are those of the URI, as they are written there and as they are meant, and those of the variables that
    MLflow and its stores take credentials from.
    """
    shown = text.replace(uri, redact(uri))
    secrets = {os.environ.get(name) for name in SECRET_VARIABLES}
    of_uri = _credentials(uri)
    secrets |= {*of_uri, *map(unquote, of_uri)}
    for secret in sorted((secret for secret in secrets if secret), key=len, reverse=True):
        shown = shown.replace(secret, HIDDEN)
    return shown


def hide_secrets(text: str) -> str:
    """Any text, fit for a log: without credentials in URLs, and without the values of variables named like secrets."""
    shown = without_secrets(text, os.environ.get("MLFLOW_TRACKING_URI") or "\0")
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and value in shown and SECRET_NAME.search(name):
            shown = shown.replace(value, HIDDEN)
    return _QUERY_IN_TEXT.sub(rf"\g<1>{HIDDEN}", _URL_IN_TEXT.sub(f"{HIDDEN}@", shown))


def holds_secret(uri: str) -> bool:
    """Whether a URI holds a password, or what a server of HTTP takes for a token."""
    user, password = _credentials(uri)
    user_is_token = uri.lower().startswith(("http:", "https:")) and bool(user)
    return bool(password) or user_is_token or bool(_SECRET_IN_QUERY.search(uri))


def _credentials(uri: str) -> tuple[str, str]:
    """(user, password) of a URI as they are written there; SQLAlchemy ends a password at the '@', whatever is in it."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return "", ""
    of_http = parts.scheme in {"http", "https"}
    user, _, password = (parts.netloc if of_http else uri.partition("://")[2]).rpartition("@")[0].partition(":")
    return (user, password) if parts.netloc else ("", "")
