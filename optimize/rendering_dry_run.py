"""What applying a rendering to a cluster would change, as its API server has it: ``burnish render --dry-run``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from optimize.cluster_config import KubernetesConfig, load_cluster
from optimize.clusters import kubernetes_client
from profiles.deploy.kubernetes_resources import RUN, Change, labels_on
from registry.codec import to_jsonable
from registry.documents import load_document
from registry.errors import InputError

# burnish's client asks for the label, and a rendering is of no run.
_RUN_NAME = "render"
_RUN_PATH = f"metadata.labels[{RUN}]"


class _Resource(BaseModel):
    """A manifest that was rendered, whatever it is of."""

    model_config = ConfigDict(extra="allow")

    kind: str
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What the API server says of each manifest.

    Attributes:
        namespace: that they would be applied in.
        changes: one for each, in the order of the files.
    """

    namespace: str
    changes: tuple[Change, ...]

    def plain(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"namespace": self.namespace, "changes": [to_jsonable(one) for one in self.changes]}

    def lines(self) -> list[str]:
        """The same for people."""
        told = [f"Applied in {self.namespace} it would:"]
        for one in self.changes:
            what = {"create": "make", "change": "change", "none": "leave as it is"}[one.action]
            told.append(f"  {what} {one.kind} {one.name}")
            if one.action == "change":
                told += [f"    {field.path}: {field.before!r} -> {field.after!r}" for field in one.fields]
        return told


def dry_run(folder: Path, cluster: Path) -> DryRun:
    """Asks the API server what applying the manifests in a folder would do; nothing is changed.

    Args:
        folder: of manifests, one a file.
        cluster: a file that names a Core 2 in Kubernetes, see `optimize.cluster_config.ClusterFile`.

    Raises:
        DocumentError: the file does not fit.
        InputError: it names no Kubernetes, or a manifest is refused, or is of a resource of somebody else's.
        UnreachableError: the API server does not answer, or refuses this account.
    """
    config = load_cluster(cluster)
    if not isinstance(config, KubernetesConfig):
        raise InputError(f"{cluster} names no Kubernetes", hint="Only its API server says what applying would do.")
    with kubernetes_client(config, cluster.resolve().parent) as client:
        changes = [_without_run(client.dry_run(_marked(file))) for file in sorted(folder.glob("*.yaml"))]
        return DryRun(namespace=client.namespace, changes=tuple(changes))


def _marked(file: Path) -> dict[str, Any]:
    manifest = load_document(file, _Resource).model_dump()
    manifest["metadata"]["labels"] = {**labels_on(manifest), RUN: _RUN_NAME}
    return manifest


def _without_run(change: Change) -> Change:
    fields = tuple(field for field in change.fields if field.path != _RUN_PATH)
    action = "none" if change.action == "change" and not fields else change.action
    return Change(kind=change.kind, name=change.name, action=action, fields=fields)
