"""What appliers to a Core 2 have in common, however they reach it."""

from typing import Generic, TypeVar

from profiles.deploy.core2_candidates import Mesh

Client = TypeVar("Client")

TIMEOUT_S = 300.0


class Core2Applier(Generic[Client]):
    """A Core 2 that resources are applied to; see `profiles.deploy.rollout.Applier`."""

    def __init__(self, client: Client, mesh: Mesh, *, location: str, timeout_s: float = TIMEOUT_S) -> None:
        """Connects to nothing yet.

        Args:
            client: of what commands it; the caller closes it.
            mesh: where requests go.
            location: which Core 2 it is, for people.
            timeout_s: longest wait for one resource.
        """
        self._client = client
        self._mesh = mesh
        self._location = location
        self._timeout_s = timeout_s

    @property
    def location(self) -> str:
        """Which Core 2 it is."""
        return self._location
