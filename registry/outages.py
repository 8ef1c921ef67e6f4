"""What is worth trying again: a store that is away for some seconds or minutes, as stores and networks are.

Fsspec's libraries try again a few times, within seconds. What lasts longer is known from here: which of their errors
say that nobody answered, or that a server cannot answer now, and how long the call is made again. A refusal is none.
"""

import errno
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from registry.filesystems import Scheme
from registry.stopping import pause

_log = logging.getLogger(__name__)
R = TypeVar("R")

PATIENCE_S = 120.0
"""How long a call is made again while its store is away."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0
_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
"""Of HTTP: those by which a server says that the same request may be answered later (RFC 9110, RFC 6585)."""
_CODES = frozenset({"InternalError", "OperationAborted", "RequestTimeout", "ServiceUnavailable", "SlowDown"})
"""Of S3: those that its API reference says to try again."""
_ERRNOS = frozenset({
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED,
})  # fmt: skip
"""By which the file system of a network says that its server is away."""


def patiently(call: Callable[[], R], *, scheme: Scheme, uri: str, patience_s: float) -> R:
    """What a call returns, which is made again while the store is away.

    Args:
        call: may be made several times.
        scheme: of the store.
        uri: of the store, for the log.
        patience_s: after so long it is not made again; 0 for a single call.

    Raises:
        Exception: the call's, as it was: a refusal at once, and the last one of an outage.
        InterruptedError: nobody waits for it any more (`registry.stopping`).
    """
    begin, pause_s, away = time.monotonic(), _FIRST_PAUSE_S, False
    while True:
        try:
            result = call()
        except Exception as error:
            left_s = begin + patience_s - time.monotonic()
            if left_s <= 0 or not is_outage(scheme, error):
                raise
            if not away:
                kind = type(error).__name__
                _log.warning("%s does not answer (%s); it is asked again for up to %g s", uri, kind, patience_s)
            away = True
        else:
            if away:
                _log.warning("%s answers again, after %.0f s", uri, time.monotonic() - begin)
            return result
        # Those that were cut off together do not come back together.
        pause(min(pause_s * random.uniform(0.5, 1.0), left_s))  # noqa: S311 (no secret hangs on it)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def is_outage(scheme: Scheme, error: BaseException) -> bool:
    """Whether an error says that the store is away, and neither that it refuses nor that the call is wrong."""
    if scheme == "file":
        return isinstance(error, OSError) and error.errno in _ERRNOS
    if (answer := answer_of(error)) is not None:
        status, code = answer
        return status in _STATUSES or code in _CODES
    lost, refused = _connection_errors(scheme)
    return isinstance(error, lost) and not any(isinstance(one, refused) for one in _origins(error))


def answer_of(error: BaseException) -> tuple[int, str] | None:
    """HTTP status and code of the answer that an error of s3fs or gcsfs was made of; None where there was none."""
    for one in _origins(error):
        response: Any = getattr(one, "response", None)
        if isinstance(response, dict):  # botocore.exceptions.ClientError
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status), str(response.get("Error", {}).get("Code", ""))
        code = getattr(one, "code", None)  # gcsfs.retry.HttpError
        if isinstance(code, int | str) and str(code).isdigit():
            return int(code), ""
    return None


def _origins(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from or while that was handled."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _connection_errors(scheme: Scheme) -> tuple[tuple[type[BaseException], ...], tuple[type[BaseException], ...]]:
    """What the libraries of a store raise where no connection or answer is had, and what of it is a refusal."""
    from aiohttp import ClientConnectionError, ClientPayloadError, ClientSSLError, InvalidURL

    # Those of fsspec and asyncio for what took too long are TimeoutError.
    lost: tuple[type[BaseException], ...] = (ConnectionError, TimeoutError, ClientConnectionError, ClientPayloadError)
    refused: tuple[type[BaseException], ...] = (ClientSSLError, InvalidURL)
    if scheme == "s3":
        from botocore import exceptions as s3
        from botocore.parsers import ResponseParserError

        # The last one comes of answers that are no XML, as those of a proxy before a store that is away.
        return (*lost, s3.ConnectionError, s3.HTTPClientError, ResponseParserError), (*refused, s3.SSLError)
    with suppress(ImportError):
        from google.auth.exceptions import TransportError

        lost = (*lost, TransportError)
    return lost, refused
