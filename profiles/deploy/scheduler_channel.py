"""Calls to Core 2's scheduler over gRPC, with TLS where it is asked for, whose errors say what was wrong."""

import logging
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import grpc

from profiles.deploy.core2_candidates import one_line
from registry.errors import InputError, UnreachableError

logger = logging.getLogger(__name__)

T = TypeVar("T")

SERVICE = "seldon.mlops.scheduler.Scheduler"
PORT = 9004
"""Where a scheduler listens for plaintext."""
TLS_PORT = 9044
"""Where a scheduler listens for mutual TLS."""

RETRY_PAUSE_S = 0.3

_REFUSALS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.OUT_OF_RANGE,
    }
)
_CONNECTION_NOISE = re.compile(
    r"failed to connect to all addresses; last error: |UNKNOWN: |UNAVAILABLE: |(?:ipv[46]|unix):\S+: "
    r"|Failed to connect to remote host: "
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSettings:
    """Files of a TLS connection, all PEM. The server's certificate is verified, always.

    Attributes:
        ca: the authorities that the scheduler's certificate is checked with; None for those of gRPC.
        certificate: our own certificate with its chain, for a scheduler that asks for one (Core 2's mTLS does).
        key: the private key of ``certificate``, without a password.
        server_name: the name that the scheduler's certificate must be for, where it is reached under another one
            (through a forwarded port, say).
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = None


class SchedulerRefusedError(InputError):
    """The scheduler does not do what it was asked, whatever is tried: a name it does not take, say."""

    kind = "scheduler_refused"


class SchedulerChannel:
    """Calls to one scheduler; connected by the first.

    A call whose connection is lost is made once more where the second does no harm, and no more than that.
    """

    def __init__(self, host: str, port: int, *, tls: TlsSettings | None, timeout_s: float) -> None:
        """Reads the files of ``tls``; connects to nothing yet.

        Args:
            host: name or address of the scheduler.
            port: its port.
            tls: None for plaintext.
            timeout_s: longest that one call may take.

        Raises:
            InputError: a file of ``tls`` is missing, or is not what it should be.
        """
        self.address = f"{host}:{port}"
        self._host = host
        self._tls = tls
        self._timeout_s = timeout_s
        options: list[tuple[str, Any]] = [
            ("grpc.enable_http_proxy", 0),
            # What is tried again is decided here, where it can be told.
            ("grpc.enable_retries", 0),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            # Also how long gRPC lets a connection take to come about: a handshake over a long way, say.
            ("grpc.min_reconnect_backoff_ms", 5000),
        ]
        if tls is None:
            self._channel = grpc.insecure_channel(self.address, options=options)
            return
        if tls.server_name:
            options.append(("grpc.ssl_target_name_override", tls.server_name))
        self._channel = grpc.secure_channel(self.address, _credentials(tls), options=options)

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def ask(self, method: str, request: Any, answer: type[T], *, about: str, again: bool = True) -> T:
        """One question, one answer.

        Args:
            method: of the scheduler.
            request: its message.
            answer: the type of the answer's message.
            about: what is asked about, for messages of error.
            again: whether to ask once more where the connection is lost.

        Raises:
            SchedulerRefusedError: the scheduler refused.
            UnreachableError: it could not be reached, failed, or did not answer in time.
        """
        call: Callable[..., T] = self._channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,  # type: ignore[attr-defined]
        )
        return self._tried(lambda: call(request, timeout=self._timeout_s), method, about, again=again)

    def ask_all(
        self,
        method: str,
        request: Any,
        answer: type[T],
        *,
        about: str,
        first: bool = False,
        timeout_s: float | None = None,
    ) -> tuple[T, ...]:
        """One question, a stream of answers; with ``first`` only that, and the stream is closed. See `ask`."""
        call: Callable[..., Any] = self._channel.unary_stream(
            f"/{SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,  # type: ignore[attr-defined]
        )

        def read() -> tuple[T, ...]:
            stream = call(request, timeout=self._timeout_s if timeout_s is None else timeout_s)
            if not first:
                return tuple(stream)
            found = next(stream, None)
            stream.cancel()
            return () if found is None else (found,)

        return self._tried(read, method, about, again=True)

    def look(self, method: str, request: Any, answer: type[T], *, about: str, timeout_s: float | None) -> T | None:
        """The first of a stream of answers on one thing; None where the scheduler knows no such thing. See `ask`."""
        try:
            found = self.ask_all(method, request, answer, about=about, first=True, timeout_s=timeout_s)
        except SchedulerRefusedError as error:
            logger.debug("%s of %s: %s", method, about, error.message)
            return None
        return found[0] if found else None

    def _tried(self, call: Callable[[], T], method: str, about: str, *, again: bool) -> T:
        try:
            return call()
        except grpc.RpcError as error:
            if not again or error.code() != grpc.StatusCode.UNAVAILABLE or _is_hopeless(error.details() or ""):
                self._raise(error, method, about)
            logger.info("%s of %s: %s; once more", method, about, error.details())
        time.sleep(RETRY_PAUSE_S)
        try:
            return call()
        except grpc.RpcError as error:
            self._raise(error, method, about)

    def _raise(self, error: Any, method: str, about: str) -> NoReturn:
        """Turns an error of gRPC into one of ours.

        Raises:
            SchedulerRefusedError: the scheduler refused what it was asked.
            UnreachableError: all else.
        """
        code, said = error.code(), one_line(error.details() or error.code().name)
        asked = f"Core 2's scheduler at {self.address}"
        if code in _REFUSALS:
            raise SchedulerRefusedError(f"{asked} refused {method} of {about}: {said}") from error
        if code is grpc.StatusCode.UNAVAILABLE:
            cause, hint = self._why_unavailable(said)
            raise UnreachableError(f"{asked} cannot be reached for {method} of {about}: {cause}", hint=hint) from error
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise UnreachableError(f"{asked} did not answer {method} of {about} in time ({said})") from error
        if code is grpc.StatusCode.UNIMPLEMENTED:
            hint = f"Schedulers listen on {PORT}, and with TLS on {TLS_PORT}."
            raise UnreachableError(
                f"{self.address} is no scheduler of Core 2: it has no {method}", hint=hint
            ) from error
        raise UnreachableError(f"{asked} failed at {method} of {about}: {code.name}: {said}") from error

    def _why_unavailable(self, said: str) -> tuple[str, str | None]:
        """The cause, and what to do, where a connection could not be had or was lost."""
        tls = self._tls
        if "certificate has expired" in said:
            return "its certificate has expired", None
        if "CERTIFICATE_VERIFY_FAILED" in said:
            ca = tls.ca if tls is not None and tls.ca is not None else "the authorities that gRPC trusts"
            return f"its certificate is not signed by {ca}", "Give the file of the authority that signed it."
        if "Hostname Verification" in said:
            name = tls.server_name if tls is not None and tls.server_name else self._host
            return f"its certificate is not for {name}", "Give the name that it is for as the server's name."
        if "WRONG_VERSION_NUMBER" in said:
            return "it does not speak TLS", f"Core 2 has its plaintext port at {PORT}, and TLS at {TLS_PORT}."
        cause = _CONNECTION_NOISE.sub("", said)
        if "Socket closed" not in said and "reset" not in said:
            return cause, None
        if tls is None:
            return cause, f"A TLS port closes connections in plaintext; Core 2 has its plaintext port at {PORT}."
        if tls.certificate is None:
            return cause, "A scheduler with mutual TLS does so where the client shows no certificate: give one."
        return cause, f"A scheduler with mutual TLS does so where it does not trust {tls.certificate}."


def _is_hopeless(said: str) -> bool:
    """Whether another try is bound to end the same way."""
    return any(sign in said for sign in ("CERTIFICATE_VERIFY", "Hostname Verification", "WRONG_VERSION"))


# --- TLS -----------------------------------------------------------------------------------------------------------


def _credentials(tls: TlsSettings) -> Any:
    """The files of ``tls``, checked here: gRPC takes what it cannot read, and fails later without saying why.

    Raises:
        InputError: one of them is missing, or is not what it should be.
    """
    if (tls.certificate is None) != (tls.key is None):
        raise InputError("a client's certificate and its key go together, and only one of them is given")
    for path in (tls.ca, tls.certificate, tls.key):
        if path is not None and not path.is_file():
            raise InputError(f"there is no file {path}, which the TLS settings name")
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if tls.ca is not None:
            context.load_verify_locations(cafile=str(tls.ca))
    except (OSError, ValueError) as error:
        raise InputError(f"{tls.ca} holds no certificates in PEM that can be read: {error}") from error
    if tls.certificate is None or tls.key is None:
        return grpc.ssl_channel_credentials(tls.ca.read_bytes() if tls.ca else None)
    try:
        context.load_cert_chain(tls.certificate, tls.key, password=_refuse_password)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{tls.certificate} and {tls.key} are no certificate and its private key: {error}",
            hint="Both are PEM files, and the key has no password.",
        ) from error
    return grpc.ssl_channel_credentials(
        tls.ca.read_bytes() if tls.ca else None, tls.key.read_bytes(), tls.certificate.read_bytes()
    )


def _refuse_password() -> str:
    # In place of OpenSSL's question on the terminal.
    raise ValueError("the key has a password")
