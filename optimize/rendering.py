"""A candidate of a finished campaign, rendered to files: what `burnish render` does."""

import difflib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optimize.rendered import former_rendering, put_rendering
from optimize.rendering_environment import Chosen, choose_environment, self_contained_warnings
from optimize.reporting import read_campaign
from profiles.deploy.placement import model_path
from profiles.serving.core2 import manifests, sizing
from profiles.serving.core2.folder import ModelFolder, model_folder
from profiles.serving.core2.hardware import ANY_NODE, Hardware
from profiles.serving.core2.schema import NEWEST, VERSIONS, Core2Version
from profiles.serving.naming import check_core2_name, model_name_of, server_name_of
from profiles.serving.roundtrip import check_roundtrip, refuse_errors
from registry.documents import load_document
from registry.errors import InputError
from registry.records import Campaign, Candidate, Estimate, Variant
from registry.store import FolderStore

Render = Literal["core2", "files"]
MANIFESTS = "manifests"
"""Where the resources are: a folder of nothing else, so that ``kubectl apply -f`` takes it whole."""
STOCK_TRITON = "23.03"
"""The release of Triton that Core 2 comes with."""
_MEMORY = ("rss_mb", "peak_rss_mb")
_WEIGHT = 10
MODELS_VOLUME_BYTES = 1 << 30
"""Core 2's default size of the volume that a server keeps its models on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """What is to be rendered, and for what.

    Attributes:
        target: ``core2`` for a model's folder with manifests, ``files`` for a repository of MLServer or Triton.
        core2_version: the release of Core 2.
        storage_uri: where the model's folder will be uploaded to: the URI's beginning.
        server: an existing Server to schedule the model to.
        image: of a Server that is rendered for it.
        hardware: a YAML file, see `profiles.serving.core2.hardware.Hardware`.
        replicas: of the model, where no rate is given.
        for_rate: requests a second that the replicas are to take together.
        max_replicas: up to which an autoscaler adds replicas.
        margin: how far below saturation a replica is to be kept.
        server_config: a file with the cluster's own ServerConfig, to render one from.
        secret: the Kubernetes secret with the rclone remote.
        self_contained: whether our code goes beside the model, for a server that has none of it.
        environment: a tarball with the engine, for a server that has none either, or ``pack`` to make one.
        beside: a Model whose requests an Experiment shares with the candidate, by ``weight`` or ``mirror``.
        weight: how many percent of them the candidate answers; 10 where neither is given.
        mirror: how many percent of them it gets copies of, and answers nobody.
        pipeline: ``NAME=STEP,...`` for a Pipeline of Models in a row, with ``{model}`` for the candidate's.
    """

    target: Render = "core2"
    core2_version: Core2Version = NEWEST
    storage_uri: str | None = None
    server: str | None = None
    image: str | None = None
    hardware: Path | None = None
    replicas: int | None = None
    for_rate: float | None = None
    max_replicas: int | None = None
    margin: float = sizing.MARGIN
    server_config: Path | None = None
    secret: str | None = None
    self_contained: bool = False
    environment: str | None = None
    beside: str | None = None
    weight: int | None = None
    mirror: int | None = None
    pipeline: str | None = None


def rendering(**fields: Any) -> Rendering:
    """What the command line asks for.

    Raises:
        InputError: a word is unknown, or two options do not go together.
    """
    asked = Rendering(**fields)
    if asked.target not in ("core2", "files"):
        raise InputError(f"there is no target {asked.target!r}", hint="It is core2 or files.")
    if asked.core2_version not in VERSIONS:
        raise InputError(f"nothing is known of Core 2 {asked.core2_version!r}", hint=f"It is {' or '.join(VERSIONS)}.")
    if asked.environment is not None and not asked.self_contained:
        raise InputError("an environment has no use without our code beside it", hint="Add --self-contained.")
    if asked.target == "files":
        given = [f"--{name.replace('_', '-')}" for name in _ONLY_CORE2 if getattr(asked, name) is not None]
        if given:
            raise InputError(f"{given[0]} is for Core 2", hint="Leave it out, or render with --target core2.")
        return asked
    if asked.storage_uri is None:
        raise InputError(
            "nothing says where Core 2 is to fetch the model from",
            hint="Give --storage-uri, the place you will upload to: s3://bucket/path, say. Or add --upload.",
        )
    if asked.server is not None and asked.image is not None:
        raise InputError(
            "--server names an existing Server, --with-server asks for a new one", hint="Give one of them."
        )
    if asked.image is None and (asked.hardware or asked.server_config):
        raise InputError("--hardware and --server-config say how a Server is made", hint="Add --with-server IMAGE.")
    if asked.replicas is not None and asked.for_rate is not None:
        raise InputError("--for-rate finds the replicas that --replicas gives", hint="Give one of them.")
    if asked.beside is None and not (asked.weight is None and asked.mirror is None):
        raise InputError("--weight and --mirror say what is shared with a Model", hint="Name it with --beside.")
    if asked.weight is not None and asked.mirror is not None:
        raise InputError("--weight has the candidate answer, --mirror does not", hint="Give one of them.")
    return asked


_ONLY_CORE2 = (
    "storage_uri", "server", "image", "hardware", "replicas", "for_rate", "max_replicas", "server_config", "secret",
    "beside", "weight", "mirror", "pipeline",
)  # fmt: skip


def render_candidate(work: Path, wanted: str | None, out: Path, asked: Rendering) -> dict[str, Any]:
    """Writes a candidate's files into a folder of their own; what was rendered there before makes room.

    Args:
        work: the campaign's working folder.
        wanted: name or id of a candidate; None for the one that the campaign selected.
        out: the folder. It is new, empty, or a former rendering that nobody has changed.
        asked: what to render.

    Returns:
        What was written, as plain values: the model's name and URI, replicas, memory, paths, and warnings.

    Raises:
        InputError: there is no such campaign or candidate, it cannot be rendered so, Core 2 would not serve it as
            rendered, or the folder is not ours.
        StorageError: the folder cannot be written.
    """
    campaign = read_campaign(work)
    candidate = find_candidate(campaign, wanted)
    former = former_rendering(out)
    with tempfile.TemporaryDirectory(prefix="burnish-environment-") as scratch:
        chosen = None
        if asked.environment is not None:
            own_server = asked.target == "files" or asked.image is not None
            chosen = choose_environment(asked.environment, candidate, Path(scratch), own_server=own_server)
        told = _render(work, campaign, candidate, out, asked=asked, chosen=chosen)
    if former not in (None, candidate.name):
        told["warnings"].append(f"{out} was rendered from {former}, and is replaced.")
    return told


def _render(
    work: Path, campaign: Campaign, candidate: Candidate, out: Path, *, asked: Rendering, chosen: Chosen | None
) -> dict[str, Any]:
    variant = next(one for one in campaign.variants if one.id == candidate.variant_id)
    source = FolderStore(work).path(variant.artifact)
    name = model_name_of(candidate)
    folder = model_folder(
        candidate,
        variant.artifact,
        model_name=name,
        self_contained=asked.self_contained,
        environment=None if chosen is None else chosen.tarball,
    )
    told: dict[str, Any] = {"candidate": candidate.name, "candidate_id": candidate.id, "model": name}
    told |= {"target": asked.target, "out": str(out)}
    if asked.target == "files":
        place, texts = name, dict(folder.settings)
    else:
        # Core 2 does not look again under a URI that it has, so other bytes need another.
        stem = model_path(name, folder.digest)
        place = f"models/{stem}"
        texts, about = _core2(campaign, candidate, folder, stem, asked)
        told |= about
    warnings = warnings_about(campaign, candidate, variant, source, asked)
    if asked.self_contained:
        warnings += self_contained_warnings(candidate, chosen)

    def check(written: Path) -> None:
        if asked.target == "core2":
            warnings.extend(_lost(written, candidate, folder, told["storage_uri"], asked))

    told["files"] = put_rendering(
        out, folder=folder, source=source, place=place, texts=texts, candidate=candidate, check=check
    )
    told["warnings"] = warnings
    told["folder"] = str(out / place)
    return told


def find_candidate(campaign: Campaign, wanted: str | None) -> Candidate:
    """The candidate of this name or id, the only one of this variant, or the one that the campaign selected.

    Raises:
        InputError: there is none.
    """
    wanted = wanted or campaign.verdict.selected
    if wanted is None:
        raise InputError("this campaign selected no candidate", hint=f"Name one: {_listed(campaign)}.")
    for candidate in campaign.candidates:
        if wanted in {candidate.id, candidate.name, model_name_of(candidate)}:
            return candidate
    of_variant = [one for one in campaign.candidates if wanted in {one.variant_id, one.variant_name}]
    if len(of_variant) == 1:
        return of_variant[0]
    if of_variant:
        names = "; ".join(one.name for one in of_variant)
        raise InputError(f"the variant {wanted!r} was served in several ways", hint=f"Name one: {names}.")
    close = difflib.get_close_matches(wanted, [one.name for one in campaign.candidates], n=1)
    raise InputError(
        f"this campaign has no candidate {wanted!r}",
        hint=f"Did you mean {close[0]!r}?" if close else f"It has: {_listed(campaign)}.",
    )


def _listed(campaign: Campaign) -> str:
    return "; ".join(candidate.name for candidate in campaign.candidates) or "none was served"


# --- numbers of the campaign -----------------------------------------------------------------------------------


def peak_memory_mb(campaign: Campaign, candidate_id: str) -> float | None:
    """The most resident memory that was seen of a candidate's server, in MB of 10^6 bytes; None where none was.

    The kernel's own peak is among it, where it tells one: what a server takes for a moment, its limit has to hold.
    """
    runs = [run for one in campaign.rounds if one.candidate_id == candidate_id for run in one.runs]
    measured = _measured(campaign, candidate_id)
    seen = [run.metrics[name] for run in runs for name in _MEMORY if name in run.metrics]
    seen += [one.metrics[name].value for one in measured for name in _MEMORY if name in one.metrics]
    return max(seen, default=None)


def saturation_of(campaign: Campaign, candidate_id: str) -> Estimate | None:
    """Where a candidate saturates, if that was measured."""
    found = (one.metrics.get("saturation_rps") for one in _measured(campaign, candidate_id))
    return next((estimate for estimate in found if estimate is not None), None)


def _measured(campaign: Campaign, candidate_id: str) -> list[Any]:
    return [one for one in campaign.measurements if one.candidate_id == candidate_id]


# --- manifests -------------------------------------------------------------------------------------------------


def _core2(
    campaign: Campaign, candidate: Candidate, folder: ModelFolder, stem: str, asked: Rendering
) -> tuple[dict[str, str], dict[str, Any]]:
    """The manifests by file name, and what to say of them."""
    name, version = model_name_of(candidate), asked.core2_version
    labels = manifests.labels_of(candidate, campaign.id)
    peak = peak_memory_mb(campaign, candidate.id)
    memory = None if peak is None else sizing.memory_needed(peak)
    per_replica = _rate_per_replica(campaign, candidate, asked)
    replicas = 1 if asked.replicas is None else asked.replicas
    if asked.for_rate is not None:
        replicas = sizing.replicas_for(asked.for_rate, per_replica / (1 - asked.margin), asked.margin)
    _check_replicas(replicas, asked.max_replicas)
    server = asked.server or (server_name_of(candidate) if asked.image else None)
    if asked.server is not None:
        check_core2_name(asked.server, "Server")
    uri = f"{str(asked.storage_uri).rstrip('/')}/{stem}"
    made = {
        "model.yaml": manifests.render_model(
            name,
            candidate,
            storage_uri=uri,
            labels=labels,
            extra=folder.extra,
            memory_bytes=memory,
            server=server,
            replicas=replicas,
            secret_name=asked.secret,
            requirements=_requirements(candidate, asked),
            version=version,
        )
    }
    if asked.image is not None:
        size_bytes = next(one.artifact.size_bytes for one in campaign.variants if one.id == candidate.variant_id)
        made |= _servers(candidate, size_bytes, labels=labels, memory=memory, replicas=replicas, asked=asked)
    made |= _experiment(name, candidate, labels, asked) | _pipeline(name, labels, asked)
    texts = {}
    if asked.max_replicas is not None:
        made["autoscaler.yaml"] = manifests.render_autoscaler(
            name,
            rate_rps=per_replica,
            min_replicas=replicas,
            max_replicas=asked.max_replicas,
            labels=labels,
            version=version,
        )
        texts["prometheus-adapter-values.yaml"] = manifests.as_yaml(manifests.adapter_rules())
    about = {
        "core2_version": version,
        "storage_uri": uri,
        "requirements": list(_requirements(candidate, asked)),
        "server": server,
        "replicas": replicas,
        "rate_per_replica_rps": per_replica or None,
        "memory_bytes": memory,
    }
    texts |= {f"{MANIFESTS}/{path}": manifests.as_yaml(manifest) for path, manifest in made.items()}
    return texts, about


def _experiment(
    name: str, candidate: Candidate, labels: Mapping[str, str], asked: Rendering
) -> dict[str, manifests.Manifest]:
    """An Experiment on the endpoint of another Model, where one is asked for."""
    if asked.beside is None:
        return {}
    check_core2_name(asked.beside, "Model")
    weight = 0 if asked.mirror is not None else _WEIGHT if asked.weight is None else asked.weight
    if not 0 <= weight <= 100:
        raise InputError(f"--weight is a percentage, not {weight}")
    shares = {asked.beside: 100 - weight}
    made = manifests.render_experiment(
        f"trial-{candidate.id[:8].lower()}",
        shares if asked.mirror is not None else {**shares, name: weight},
        labels=labels,
        default=asked.beside,
        mirror=None if asked.mirror is None else (name, asked.mirror),
        version=asked.core2_version,
    )
    return {"experiment.yaml": made}


def _pipeline(name: str, labels: Mapping[str, str], asked: Rendering) -> dict[str, manifests.Manifest]:
    """A Pipeline of Models in a row, the candidate's among them, where one is asked for."""
    if asked.pipeline is None:
        return {}
    called, equals, listed = asked.pipeline.partition("=")
    steps = [step.strip() for step in listed.split(",")]
    if not equals or steps.count("{model}") != 1:
        raise InputError(
            f"--pipeline {asked.pipeline!r} is not understood",
            hint="Write NAME=STEP,STEP with the names of Models, and {model} once for the candidate's.",
        )
    steps = [name if step == "{model}" else step for step in steps]
    for step in steps:
        check_core2_name(step, "Model")
    made = manifests.render_pipeline(called, steps, labels=labels, version=asked.core2_version)
    return {"pipeline.yaml": made}


def _requirements(candidate: Candidate, asked: Rendering) -> tuple[str, ...]:
    """The capabilities that its server must have."""
    return (manifests.SELF_CONTAINED if asked.self_contained else manifests.REQUIREMENTS)[candidate.serving.backend]


def _rate_per_replica(campaign: Campaign, candidate: Candidate, asked: Rendering) -> float:
    """What a replica is to be given; 0 where nobody asked."""
    if asked.for_rate is None and asked.max_replicas is None:
        return 0.0
    saturation = saturation_of(campaign, candidate.id)
    if saturation is None:
        raise InputError(
            f"no saturation point was measured of {candidate.name!r}, so no number of replicas follows from a rate",
            hint="Give --replicas, without --for-rate and --max-replicas.",
        )
    known = saturation.value if saturation.low is None else saturation.low
    return sizing.rate_per_replica(known, asked.margin)


def _check_replicas(replicas: int, most: int | None) -> None:
    if replicas < 1:
        raise InputError(f"{replicas} replicas cannot be asked for", hint="It is 1 or more.")
    if most is not None and most < replicas:
        raise InputError(f"--max-replicas {most} is below the {replicas} replicas to begin with")


def _servers(
    candidate: Candidate,
    size_bytes: int,
    *,
    labels: Mapping[str, str],
    memory: int | None,
    replicas: int,
    asked: Rendering,
) -> dict[str, manifests.Manifest]:
    hardware = ANY_NODE if asked.hardware is None else load_document(asked.hardware, Hardware)
    made = {}
    config = None
    name = server_name_of(candidate)
    if asked.server_config is not None:
        config = name
        made["serverconfig.yaml"] = manifests.render_server_config(
            name,
            _read_json(asked.server_config),
            labels=labels,
            server=candidate.serving.server,
            models_bytes=size_bytes if 2 * size_bytes > MODELS_VOLUME_BYTES else None,
            version=asked.core2_version,
        )
    made["server.yaml"] = manifests.render_server(
        name,
        candidate.serving,
        labels=labels,
        image=asked.image,
        memory_bytes=memory,
        hardware=hardware,
        replicas=replicas,
        max_replicas=asked.max_replicas,
        server_config=config,
        capabilities=_requirements(candidate, asked),
        version=asked.core2_version,
    )
    return made


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    return content if isinstance(content, dict) else {}


# --- warnings --------------------------------------------------------------------------------------------------


def warnings_about(
    campaign: Campaign, candidate: Candidate, variant: Variant, source: Path, asked: Rendering
) -> list[str]:
    """What somebody who deploys this should know of."""
    found = []
    if campaign.verdict.provisional and candidate.id == campaign.verdict.selected:
        found.append(f"It was chosen at the level {campaign.level!r}: its verdict is provisional.")
    if candidate.id != campaign.verdict.selected:
        found.append("The campaign did not select this candidate.")
    if asked.target == "files":
        return found
    if asked.hardware is not None and load_document(asked.hardware, Hardware).gpus:
        found.append("The Server gets a GPU, and this candidate runs on the CPU.")
    if peak_memory_mb(campaign, candidate.id) is None:
        found.append("Its memory was not measured, so that Core 2 counts it as nothing.")
    if asked.for_rate is not None or asked.max_replicas is not None:
        where = candidate.cluster or campaign.host.cpu_model
        found.append(f"Replicas are counted by the saturation on {where}; on other nodes it differs.")
    stock = manifests.STOCK_CAPABILITIES.get(asked.server or "")
    requirements = _requirements(candidate, asked)
    lacking = set(requirements) - (stock or set())
    if stock is not None and lacking:
        found.append(
            f"The Server {asked.server!r} of Core 2's own has no capability {', '.join(sorted(lacking))}: "
            "unless yours has, the model is not scheduled."
        )
    if asked.server is None and asked.image is None and "burnish" in requirements:
        found.append("No Server of Core 2's own has the capability 'burnish': name one, or render it --with-server.")
    if 2 * variant.artifact.size_bytes > MODELS_VOLUME_BYTES and asked.server_config is None:
        found.append(
            "The model may not fit the volume that a server keeps models on (1 GiB, and a copy while it loads): "
            "render a ServerConfig with --server-config."
        )
    if candidate.serving.backend == "onnxruntime":
        found += list(_triton_refuses(source / variant.artifact.entry, asked.image))
    return found


def _lost(written: Path, candidate: Candidate, folder: ModelFolder, uri: str, asked: Rendering) -> list[str]:
    """What the agent may do to the folder as it stands.

    Raises:
        InputError: it would lose a setting, or refuse the model.
    """
    found = check_roundtrip(
        written,
        candidate.serving.server,
        name=model_name_of(candidate),
        uri=uri,
        # The secret holds the remote of that name; without one, nobody here knows what the cluster has.
        remotes=None if asked.secret is None else (uri.partition(":")[0],),
        parameters=manifests.model_parameters(candidate, folder.extra),
        requirements=_requirements(candidate, asked),
    )
    refuse_errors(candidate.name, found)
    return [f"{one.file}: {one.message}. {one.way}" for one in found if one.severity == "warning"]


def _triton_refuses(model: Path, image: str | None) -> Iterator[str]:
    """What the Triton of the image, or Core 2's own, would not load; nothing where its release is not known."""
    from optimize.readiness.lint import lint

    tag = re.search(r":(\d\d\.\d\d)(?![\d.])", image or f":{STOCK_TRITON}")
    if tag is None:
        return
    try:
        findings = lint(model, triton=tag[1])
    except InputError as error:
        yield f"Whether Triton {tag[1]} takes the model is not known: {error.message}"
        return
    for found in findings:
        yield f"Triton {tag[1]}: {found['message']}. {found['fix']}"


def lines(told: Mapping[str, Any]) -> list[str]:
    """What `render_candidate` told, for a person."""
    shown = [f"{told['candidate']} as {told['model']}: {len(told['files'])} files in {told['out']}"]
    if told["target"] == "core2":
        memory = told["memory_bytes"]
        asked = f"{memory / 1e6:.0f} MB" if memory else "unknown memory"
        shown.append(f"{told['replicas']} replicas, {asked} each, on a server with {', '.join(told['requirements'])}")
        if "uploaded" in told:
            shown.append(f"{'Uploaded' if told['uploaded'] else 'Was there already'}: {told['placed_uri']}")
        else:
            shown.append(f"Upload it: rclone copy {told['folder']} {told['storage_uri']}")
        shown.append(f"Then:      kubectl apply -f {told['out']}/{MANIFESTS}")
    return shown
