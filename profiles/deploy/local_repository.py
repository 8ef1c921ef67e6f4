"""What a Core 2 agent would put into its server's repository for a candidate, made on this machine."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from profiles.serving.core2.folder import ModelFolder, model_folder, write_folder
from profiles.serving.core2.manifests import REQUIREMENTS, model_parameters
from profiles.serving.naming import model_name_of
from profiles.serving.roundtrip import Rewritten, agent_rewrite, refuse_errors
from registry.records import Artifact, Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A candidate's folder as Core 2 would fetch it, and what its agent makes of it.

    Attributes:
        folder: what is in it.
        rewritten: what the server gets.
    """

    folder: ModelFolder
    rewritten: Rewritten


def fetch(candidate: Candidate, artifact: Artifact, files: Path, place: Path) -> Fetched:
    """Writes the folder that Core 2 would be given for a candidate, and applies what its agent does.

    Args:
        candidate: what is to be served.
        artifact: its model.
        files: folder with the artifact's files; they are linked, or copied where they are on another device.
        place: where the folder is written; what is there is removed. It is needed until the outcome is laid out.

    Raises:
        InputError: the candidate cannot be rendered for its server, or Core 2 would lose a setting or refuse it.
    """
    name = model_name_of(candidate)
    folder = model_folder(candidate, artifact, model_name=name)
    shutil.rmtree(place, ignore_errors=True)
    write_folder(folder, files, place, put=_link)
    rewritten = agent_rewrite(
        place,
        candidate.serving.server,
        name=name,
        parameters=model_parameters(candidate, folder.extra),
        requirements=REQUIREMENTS[candidate.serving.backend],
    )
    refuse_errors(candidate.name, rewritten.findings)
    return Fetched(folder=folder, rewritten=rewritten)


def remove_model(repository: Path, model: str) -> None:
    """Removes a model's files from a repository, where it has any."""
    shutil.rmtree(repository / model, ignore_errors=True)


def _link(source: Path, place: Path) -> None:
    # A hard link: engines refuse weights outside the model's folder, which is where a symbolic link leads.
    try:
        place.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, place)
