"""The environment of a server's container, as a Core 2 Server sets it, and as it is set on this machine."""

from profiles.serving.mlserver import ENVIRONMENT
from registry.records import ServingProfile


def container_environment(serving: ServingProfile) -> dict[str, str]:
    """Name -> value of what a serving profile asks of the server itself, which no model's files can.

    Args:
        serving: the profile.
    """
    environment = {"OMP_NUM_THREADS": str(serving.threads)}
    if serving.server == "mlserver":
        environment |= {"MLSERVER_PARALLEL_WORKERS": str(serving.parallel_workers), **ENVIRONMENT}
    return environment
