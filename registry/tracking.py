"""Where campaigns are recorded: the user's tracking server, or a store in the working folder."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from registry.errors import InputError
from registry.ports import Tracker

_SECRET_IN_QUERY = re.compile(r"([?&][^=&]*(?:password|passwd|pwd|secret|token|key)[^=&]*=)[^&#]*", re.IGNORECASE)
HIDDEN = "***"


def open_tracker(uri: str | None, work: Path) -> Tracker:
    """The tracker at ``uri``, else at ``MLFLOW_TRACKING_URI``, else a SQLite store in the folder ``work``.

    Nothing is connected or written yet; `Tracker.check` does that.
    """
    # MLflow takes seconds to import, and commands that record nothing need it not.
    from registry.mlflow_tracking import MlflowTracker

    return MlflowTracker(uri or os.environ.get("MLFLOW_TRACKING_URI") or embedded_uri(work), work)


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
    netloc = parts.netloc
    if "@" in netloc:
        netloc = f"{HIDDEN}@{netloc.rpartition('@')[2]}"
    # urlunsplit would turn sqlite:///x into sqlite:/x, so a URI without a host stays as it was.
    shown = urlunsplit(parts._replace(netloc=netloc)) if netloc else uri
    return _SECRET_IN_QUERY.sub(rf"\g<1>{HIDDEN}", shown)


def without_secrets(text: str, uri: str) -> str:
    """The text with every mention of the URI redacted, and the secrets of the URI hidden wherever they stand."""
    shown = text.replace(uri, redact(uri))
    try:
        secrets = (urlsplit(uri).password, urlsplit(uri).username)
    except ValueError:
        return shown
    for secret in secrets:
        if secret:
            shown = shown.replace(secret, HIDDEN)
    return shown
