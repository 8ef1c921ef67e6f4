"""What a variant was made of and with, as a bill of materials: CycloneDX 1.6, by its own library."""

import importlib.metadata
import json
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from registry.records import Artifact, Campaign, Source, Variant

_CLASSIFIER = "License :: OSI Approved :: "


def bill_of_materials(campaign: Campaign, variant: Variant, source: Source) -> dict[str, Any]:
    """The variant, the model it was made from, and the packages of the campaign, as CycloneDX 1.6 has them in JSON.

    A licence is that which an installed package of the same version states; where there is none, none is said. The same
    document for the same campaign and environment.
    """
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    root = _model(variant.name, variant.id, variant.artifact)
    origin = _model(source.name, source.digest, source.artifact)
    packages = [
        Component(
            name=name,
            version=version,
            type=ComponentType.LIBRARY,
            bom_ref=f"package:{name}",
            purl=PackageURL(type="pypi", name=name, version=version),
            licenses=_licences(name, version),
        )
        for name, version in sorted(campaign.versions.items())
    ]
    bom = Bom(
        components=[origin, *packages],
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"urn:burnish:{campaign.id}:{variant.id}"),
    )
    bom.metadata.timestamp = _when(campaign.started_at)
    bom.metadata.component = root
    bom.register_dependency(root, [origin, *packages])
    content: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    return content


def stated_licences(versions: Mapping[str, str]) -> dict[str, str]:
    """Package -> the licence it states, of those that are installed in this version and state one."""
    found = {name: _stated(name, version) for name, version in versions.items()}
    return {name: licence for name, licence in sorted(found.items()) if licence}


def _model(name: str, identity: str, artifact: Artifact) -> Any:
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType

    files = [
        Component(
            name=file.path,
            type=ComponentType.FILE,
            bom_ref=f"file:{identity}/{file.path}",
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=file.sha256)],
        )
        for file in artifact.files
    ]
    return Component(
        name=name,
        version=identity,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=f"model:{identity}",
        components=files,
    )


def _licences(name: str, version: str) -> list[Any]:
    from cyclonedx.contrib.license.factories import LicenseFactory

    stated = _stated(name, version)
    return [LicenseFactory().make_from_string(stated)] if stated else []


def _stated(name: str, version: str) -> str:
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
    if metadata["Version"] != version:
        return ""
    if "License-Expression" in metadata:
        return str(metadata["License-Expression"])
    classified = metadata.get_all("Classifier") or ()
    return " and ".join(one.removeprefix(_CLASSIFIER) for one in classified if one.startswith(_CLASSIFIER))


def _when(started_at: str) -> datetime:
    try:
        return datetime.fromisoformat(started_at).astimezone(UTC)
    except ValueError:
        return datetime.fromtimestamp(0, UTC)
