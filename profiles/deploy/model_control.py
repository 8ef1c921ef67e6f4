"""Model control by the repository API of the V2 protocol, over REST: which models a server has, load and unload.

MLServer and Triton (with ``--model-control-mode=explicit``) both have it. A Core 2 agent does the same over gRPC.

Source: the model repository extension of the V2 protocol, in Triton's documentation (``extension_model_repository.md``)
and in MLServer's OpenAPI of its model repository.
"""

import http.client
import json
import time
from typing import Any

from registry.errors import UnreachableError

_PROBE_S = 2.0
_ANSWER_S = 10.0
_POLL_S = 0.02
_LONGEST_REASON = 2000


class ModelRefusedError(UnreachableError):
    """The server answered that it will not; its message is the server's reason."""


class ModelControl:
    """One server's repository of models. Each call opens a connection of its own."""

    def __init__(self, address: str) -> None:
        """Connects to nothing yet; ``address`` is ``host:port`` of the server's REST."""
        self._address = address

    def server_name(self) -> str | None:
        """What the server calls itself; None where nobody answers, or nobody who speaks the V2 protocol."""
        try:
            status, body = self._ask("GET", "/v2", timeout_s=_PROBE_S)
            name = json.loads(body)["name"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return str(name) if status == http.client.OK else None

    def is_ready(self, model: str) -> bool:
        """Whether the server says that it answers requests to a model."""
        try:
            return self._ask("GET", f"/v2/models/{model}/ready", timeout_s=_PROBE_S)[0] == http.client.OK
        except OSError:
            return False

    def index(self) -> dict[str, str]:
        """Model -> ``READY``, ``UNAVAILABLE``, ``LOADING``, ``UNLOADING`` or ``UNKNOWN``, of all in the repository.

        Raises:
            ModelRefusedError: the server's answer is no index.
            ConnectionError: nobody answers any more.
            TimeoutError: nobody answered yet.
        """
        status, body = self._ask("POST", "/v2/repository/index", timeout_s=_ANSWER_S)
        try:
            # MLServer on Python 3.11 writes State.READY, and Triton no state of a model that it never loaded.
            states = {one["name"]: str(one.get("state", "")).rpartition(".")[2] for one in json.loads(body)}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelRefusedError(_reason(status, body)) from error
        return {name: state or "UNAVAILABLE" for name, state in states.items()}

    def load(self, model: str, *, timeout_s: float) -> None:
        """Has the server load a model, anew where it is loaded; returns when it has.

        Raises:
            ModelRefusedError: it could not.
            ConnectionError: the server went away over it, or is none.
            TimeoutError: it has not answered yet.
        """
        self._tell(model, "load", timeout_s)

    def unload(self, model: str, *, timeout_s: float) -> None:
        """Has the server unload a model; returns when it has, and at once where it has no such model.

        Raises:
            ModelRefusedError: it would not.
            ConnectionError: nobody answers any more.
            TimeoutError: it has not answered yet, or has not let go of the model.
        """
        deadline = time.monotonic() + timeout_s
        if self.index().get(model, "UNAVAILABLE") == "UNAVAILABLE":
            return
        self._tell(model, "unload", timeout_s)
        # Triton answers when it has begun to.
        while self.index().get(model, "UNAVAILABLE") != "UNAVAILABLE":
            if time.monotonic() > deadline:
                raise TimeoutError(f"{model} is still being unloaded after {timeout_s:.0f} s")
            time.sleep(_POLL_S)

    def _tell(self, model: str, what: str, timeout_s: float) -> None:
        status, body = self._ask("POST", f"/v2/repository/models/{model}/{what}", timeout_s=timeout_s)
        if status != http.client.OK:
            raise ModelRefusedError(_reason(status, body))

    def _ask(self, method: str, path: str, *, timeout_s: float) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._address, timeout=max(timeout_s, 0.001))
        body = "{}" if method == "POST" else None
        try:
            connection.request(method, path, body=body, headers={"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        except http.client.HTTPException as error:
            raise ConnectionError(str(error) or type(error).__name__) from error
        finally:
            connection.close()


def _reason(status: int, body: bytes) -> str:
    text = body.decode(errors="replace").strip()
    try:
        said: Any = json.loads(text)
    except ValueError:
        said = None
    reason = said.get("error") if isinstance(said, dict) else None
    return str(reason or text or f"status {status}")[:_LONGEST_REASON]
