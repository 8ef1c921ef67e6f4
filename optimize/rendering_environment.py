"""The environment of a self-contained candidate, and what somebody who deploys it to another's image should know."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from profiles.serving.environment_tarball import Environment, check_environment, here, pack_environment
from registry.errors import InputError, StorageError
from registry.records import Candidate

PACK = "pack"
"""The word for a tarball that burnish makes; any other is the path of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A tarball to put beside the model.

    Attributes:
        tarball: the file.
        found: what is in it; None where burnish packed it.
    """

    tarball: Path
    found: Environment | None


def choose_environment(wanted: str, candidate: Candidate, scratch: Path, *, own_server: bool) -> Chosen:
    """The tarball that is asked for, made or checked.

    Args:
        wanted: `PACK`, or the path of a tarball.
        candidate: whose engine has to be in it.
        scratch: a folder to make it in.
        own_server: whether the server is rendered too, with the workers of the candidate.

    Raises:
        InputError: the candidate's server has no use for it, or it cannot be made, or is none.
        StorageError: there is no room for it.
    """
    serving, engine = candidate.serving, candidate.engine.name
    if serving.server != "mlserver":
        raise InputError(
            f"{candidate.name!r} is for Triton, and an environment is for MLServer",
            hint=f"Install {engine}=={candidate.engine_version} in the Python that Triton's Python backend runs.",
        )
    if own_server and not serving.parallel_workers:
        raise InputError(
            f"{candidate.name!r} is served without workers, and MLServer takes an environment to workers alone",
            hint="Serve it with parallel_workers 1, or have the engine in the server's image.",
        )
    if wanted != PACK:
        return Chosen(tarball=Path(wanted), found=check_environment(Path(wanted), engine))
    target = scratch / "environment.tar.gz"
    try:
        pack_environment(engine, candidate.engine_version, target)
    except OSError as error:
        raise StorageError(f"the environment cannot be packed: {error}", hint="TMPDIR names another disk.") from error
    return Chosen(tarball=target, found=None)


def self_contained_warnings(candidate: Candidate, chosen: Chosen | None) -> Iterator[str]:
    """What the candidate needs of a server that was not made for it, and how it differs from what was measured."""
    engine = f"{candidate.engine.name} {candidate.engine_version}"
    if chosen is None:
        beside = " and numpy before 2" if candidate.serving.server == "triton" else ""
        yield f"The server's Python has to have the engine{beside}: {engine} was measured."
        return
    python = here() if chosen.found is None else f"Python {chosen.found.python}"
    yield f"The environment is for {python}: the server's own has to be the same (3.10 in MLServer's own image)."
    if chosen.found is not None and chosen.found.engine_version != candidate.engine_version:
        has = chosen.found.engine_version or "an unknown version"
        yield f"The environment has {candidate.engine.name} {has}: {engine} was measured."
    if not candidate.serving.parallel_workers:
        yield "It was measured without workers: with an environment it runs in one, so set MLSERVER_PARALLEL_WORKERS."
    yield "With an environment, tensors pass MLServer as Python lists: large ones take longer than was measured."
