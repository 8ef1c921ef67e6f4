"""A candidate's folder, as a Core 2 agent fetches it: the rendered files beside the artifact's."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from profiles.serving.mlserver import render_mlserver
from profiles.serving.triton import render_triton
from registry.errors import InputError
from registry.records import Artifact, Candidate

_PORTS = {"http_port": 8080, "grpc_port": 8081, "metrics_port": 8082}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """What stands in a candidate's folder.

    Attributes:
        rendered: path in the folder -> text of the files that burnish writes.
        files: path in the folder -> path in the artifact of the files that are the model.
        settings: path -> text of files that belong above the folder, for a server without Core 2.
        digest: SHA-256 (hex) over the sorted lines ``<sha256>  <path>``, each ended by a newline, of all files in the
            folder: what a content-addressed URI is made of.
    """

    rendered: Mapping[str, str]
    files: Mapping[str, str]
    settings: Mapping[str, str]
    digest: str

    @property
    def extra(self) -> dict[str, str]:
        """``parameters.extra`` of the folder's model-settings.json; empty for Triton."""
        text = self.rendered.get("model-settings.json")
        found: dict[str, Any] = json.loads(text)["parameters"]["extra"] if text else {}
        return {key: str(value) for key, value in found.items()}


def model_folder(candidate: Candidate, artifact: Artifact, *, model_name: str) -> ModelFolder:
    """The folder of a candidate: the same files that are served on this machine when it is measured.

    Triton's model is in the version folder ``1``, MLServer's beside its settings.

    Raises:
        InputError: the candidate cannot be rendered for its server, or a file of the model has a rendered one's name.
    """
    if candidate.serving.server == "triton":
        texts, below = render_triton(candidate, artifact, model_name=model_name), "1"
    else:
        texts, below = render_mlserver(candidate, artifact, model_name=model_name, **_PORTS), ""
    inside = f"{model_name}/"
    rendered = {path.removeprefix(inside): text for path, text in texts.items() if path.startswith(inside)}
    files = {str(PurePosixPath(below, file.path)): file.path for file in artifact.files}
    if twice := sorted(set(files) & set(rendered)):
        raise InputError(f"the model has a file {twice[0]!r} of its own, where burnish would write one")
    digests = {path: hashlib.sha256(text.encode()).hexdigest() for path, text in rendered.items()}
    own = {file.path: file.sha256 for file in artifact.files}
    digests |= {path: own[source] for path, source in files.items()}
    lines = "".join(f"{sha256}  {path}\n" for path, sha256 in sorted(digests.items()))
    return ModelFolder(
        rendered=rendered,
        files=files,
        settings={path: text for path, text in texts.items() if not path.startswith(inside)},
        digest=hashlib.sha256(lines.encode()).hexdigest(),
    )


def write_folder(folder: ModelFolder, source: Path, target: Path) -> None:
    """Writes the folder to ``target``, which is not there yet; ``source`` holds the artifact's files, to be copied."""
    for path, text in folder.rendered.items():
        place = target / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    for path, original in folder.files.items():
        place = target / path
        place.parent.mkdir(parents=True, exist_ok=True)
        # Copies, and writable ones: what is done to them must not reach the store.
        shutil.copyfile(source / original, place)
