"""A candidate's folder, as a Core 2 agent fetches it: the rendered files beside the artifact's."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from profiles.serving.environment_tarball import tarball_name
from profiles.serving.mlserver import render_mlserver
from profiles.serving.self_contained import bundle_for
from profiles.serving.triton import render_triton
from registry.codec import file_sha256
from registry.errors import InputError
from registry.records import Artifact, Candidate

_PORTS = {"http_port": 8080, "grpc_port": 8081, "metrics_port": 8082}

Put = Callable[[Path, Path], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """What stands in a candidate's folder.

    Attributes:
        rendered: path in the folder -> text of the files that burnish writes.
        files: path in the folder -> path in the artifact of the files that are the model.
        settings: path -> text of files that belong above the folder, for a server without Core 2.
        digest: SHA-256 (hex) over the sorted lines ``<sha256>  <path>``, each ended by a newline, of all files in the
            folder: what a content-addressed URI is made of.
        beside: path in the folder -> a file of this machine that is neither: an environment.
    """

    rendered: Mapping[str, str]
    files: Mapping[str, str]
    settings: Mapping[str, str]
    digest: str
    beside: Mapping[str, Path] = field(default_factory=dict)

    @property
    def extra(self) -> dict[str, str]:
        """``parameters.extra`` of the folder's model-settings.json; empty for Triton."""
        text = self.rendered.get("model-settings.json")
        found: dict[str, Any] = json.loads(text)["parameters"]["extra"] if text else {}
        return {key: str(value) for key, value in found.items()}


def model_folder(
    candidate: Candidate,
    artifact: Artifact,
    *,
    model_name: str,
    self_contained: bool = False,
    environment: Path | None = None,
) -> ModelFolder:
    """The folder of a candidate: the same files that are served on this machine when it is measured.

    Triton's model is in the version folder ``1``, MLServer's beside its settings.

    Args:
        candidate: what is served, and how.
        artifact: its model.
        model_name: its name on the server.
        self_contained: whether our code is in the folder too, for a server that has none of it.
        environment: a tarball with an engine, for a server that has none either: for MLServer, with ``self_contained``.

    Raises:
        InputError: the candidate cannot be rendered for its server, or a file of the model has a rendered one's name.
    """
    bundle = bundle_for(candidate) if self_contained else None
    beside = {} if environment is None else {tarball_name(environment): environment}
    if candidate.serving.server == "triton":
        if beside:
            raise InputError(f"{candidate.name!r} is for Triton, and an environment is for MLServer")
        texts, below = render_triton(candidate, artifact, model_name=model_name, bundle=bundle), "1"
    else:
        below = ""
        texts = render_mlserver(
            candidate, artifact, model_name=model_name, bundle=bundle, environment=next(iter(beside), None), **_PORTS
        )
    inside = f"{model_name}/"
    rendered = {path.removeprefix(inside): text for path, text in texts.items() if path.startswith(inside)}
    files = {str(PurePosixPath(below, file.path)): file.path for file in artifact.files}
    if twice := sorted(set(files) & {*rendered, *beside}):
        raise InputError(f"the model has a file {twice[0]!r} of its own, where burnish would write one")
    digests = {path: hashlib.sha256(text.encode()).hexdigest() for path, text in rendered.items()}
    own = {file.path: file.sha256 for file in artifact.files}
    digests |= {path: own[source] for path, source in files.items()}
    digests |= {path: file_sha256(source) for path, source in beside.items()}
    lines = "".join(f"{sha256}  {path}\n" for path, sha256 in sorted(digests.items()))
    return ModelFolder(
        rendered=rendered,
        files=files,
        settings={path: text for path, text in texts.items() if not path.startswith(inside)},
        digest=hashlib.sha256(lines.encode()).hexdigest(),
        beside=beside,
    )


def write_folder(folder: ModelFolder, source: Path, target: Path, *, put: Put = shutil.copyfile) -> None:
    """Writes the folder to ``target``, which is not there yet.

    Args:
        folder: what is in it.
        source: holds the artifact's files.
        target: the folder.
        put: brings a file of the model, the first, to where it is to be, the second. A copy is one's own, and
            writable; what is done to a link reaches the artifact's store.
    """
    for path, text in folder.rendered.items():
        place = target / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    originals = {path: source / original for path, original in folder.files.items()} | dict(folder.beside)
    for path, original in originals.items():
        place = target / path
        place.parent.mkdir(parents=True, exist_ok=True)
        put(original, place)
