"""`burnish check`: whether a server gives each of many concurrent requests its own answer.

`profiles.measure.equivalence` is the method. Here is what it needs of a model: samples where none are given, and what
the model answers in process.
"""

import http.client
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimize.adaptation import adapt
from optimize.cluster_config import load_cluster
from optimize.clusters import open_file
from optimize.endpoints import check_seed, endpoint
from optimize.in_process import answers_of_file, answers_or_refusal, check_reference
from optimize.rendering import find_candidate
from optimize.reporting import read_campaign
from optimize.samples import load_samples
from profiles.measure.asking import ask, what_is_wrong
from profiles.measure.equivalence import MOST_ROWS, check_equivalence
from profiles.measure.host import split_cpus
from registry.codec import to_jsonable
from registry.errors import InputError, UnreachableError
from registry.records import Equivalence, Target, TensorSpec
from registry.store import FolderStore

Arrays = Mapping[str, NDArray[Any]]

SAMPLES = 64
_LOAD_TIMEOUT_S = 120.0
_METADATA_S = 10.0
_FREE_SIZE = 16


def check_endpoint(
    url: str,
    *,
    model: str | None,
    samples: Path | None,
    reference: Path | None,
    protocol: str | None,
    headers: Sequence[str] = (),
    tls: bool = False,
    **how: Any,
) -> dict[str, Any]:
    """Checks any V2 endpoint; see ``burnish check --help``.

    Args:
        url: ``host:port``.
        model: the model's name there.
        samples: an ``.npz`` with one array per input; None for random ones that fit the endpoint's metadata.
        reference: the model that is served, as an ``.onnx`` or OpenVINO ``.xml`` file, to be run in process; None for
            what the server itself answers to one sample at a time.
        protocol: ``grpc`` or ``rest``; None for the address's (``http://``), or gRPC.
        headers: ``name=value``, sent with each request.
        tls: whether to encrypt.
        how: ``requests``, ``concurrency``, ``tolerance``, ``seed``.

    Returns:
        What was found, as plain values.

    Raises:
        InputError: an option or the samples do not fit.
        UnreachableError: the endpoint does not answer, or refuses.
    """
    _check_amounts(**how)
    if model is None:
        raise InputError("--model is missing", hint="Give the model's name on the server.")
    check_reference(reference)
    target = endpoint(url, model, protocol, headers, tls)
    specs = None if samples is not None else describe_inputs(target)
    inputs = _inputs(samples, specs, seed=how["seed"])
    one_row = specs is not None and any(spec.shape[0] == 1 for spec in specs)
    known = None
    if reference is not None:
        inputs = _first(inputs, how["requests"])
        known = answers_of_file(reference, inputs, batch_size=how["concurrency"], seed=how["seed"])
    found = check_equivalence(target, inputs, reference=known, most_rows=1 if one_row else MOST_ROWS, **how)
    return _plain(target, found, against="the server itself, asked alone" if known is None else str(reference))


def check_candidate(
    wanted: str, work: Path, *, samples: Path | None, protocol: str | None, cluster: Path | None = None, **how: Any
) -> dict[str, Any]:
    """Serves a candidate of a campaign and checks it against the same model in process.

    Args:
        wanted: name or id of a candidate.
        work: the campaign's working folder.
        samples: as for `check_endpoint`, as the campaign's evaluation samples are.
        protocol: None for the candidate's own.
        cluster: a file that names a Core 2, see `optimize.cluster_config.ClusterFile`; None for this machine.
        how: as for `check_endpoint`.

    Raises:
        InputError: there is no such campaign or candidate, or samples do not fit.
        UnreachableError: the server refused the model, or does not answer.
    """
    _check_amounts(**how)
    campaign = read_campaign(work)
    candidate = find_candidate(campaign, wanted)
    if protocol not in (None, candidate.serving.protocol):
        raise InputError(
            f"{candidate.name!r} is served over {candidate.serving.protocol}", hint="Leave --protocol out."
        )
    if (why := load_cluster(cluster).why_not(candidate.serving)) is not None:
        raise InputError(f"{candidate.name!r} cannot be served so: {why}")
    variant = next(one for one in campaign.variants if one.id == candidate.variant_id)
    files = FolderStore(work).path(variant.artifact)
    if samples is None:
        # A session takes any number of rows, also where the model itself fixes it.
        specs = [replace(spec, shape=(None, *spec.shape[1:])) for spec in variant.artifact.inputs]
        inputs = _first(random_inputs(specs, SAMPLES, seed=how["seed"]), how["requests"])
    else:
        inputs = _first(adapt(load_samples(samples).inputs, variant.adaptation), how["requests"])
    most = candidate.serving.max_batch_size
    entry, threads = files / variant.artifact.entry, candidate.serving.threads
    known = answers_or_refusal(entry, candidate.engine, inputs, batch_size=most, seed=how["seed"], threads=threads)
    with (
        TemporaryDirectory(prefix="burnish-check-") as name,
        open_file(cluster, work=Path(name), purpose="check", server_cpus=split_cpus()[0]) as site,
    ):
        target = site.cluster.deploy(candidate, variant.artifact, files, timeout_s=_LOAD_TIMEOUT_S).target
        found = check_equivalence(target, inputs, reference=known, most_rows=min(MOST_ROWS, most), **how)
    return {"candidate": candidate.name, **_plain(target, found, against="the same model in process")}


def describe_inputs(target: Target) -> tuple[TensorSpec, ...]:
    """The inputs that an endpoint's metadata names.

    Raises:
        UnreachableError: it does not answer, or says nothing of inputs.
    """
    try:
        tensors = _grpc_metadata(target) if target.protocol == "grpc" else _rest_metadata(target)
        from tritonclient.utils import triton_to_np_dtype

        return tuple(
            TensorSpec(
                name=name,
                dtype="str" if datatype == "BYTES" else np.dtype(triton_to_np_dtype(datatype)).name,
                shape=tuple(None if size < 0 else size for size in shape),
            )
            for name, datatype, shape in tensors
        )
    except UnreachableError:
        raise
    except Exception as error:
        # Foreign bytes can break a foreign parser in any way.
        raise UnreachableError(
            f"the server at {target.url} does not describe the model {target.model!r}: {what_is_wrong(error)}",
            hint="Check address and name, or give --samples, so that the description is not needed.",
        ) from error


def random_inputs(specs: Sequence[TensorSpec], count: int, *, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Samples of chance for these inputs: normal values, and zeros and ones where integers may be indices or masks.

    Args:
        specs: of which the first dimension counts samples; others that are free become 16.
        count: of samples.
        seed: of their values.

    Raises:
        InputError: an input takes words, or has no dimension that counts samples.
    """
    chance = np.random.default_rng(seed)
    inputs: dict[str, NDArray[Any]] = {}
    if not specs:
        raise InputError("the model's description names no inputs", hint="Give --samples.")
    for spec in specs:
        if spec.dtype in {"str", "object"} or not spec.shape or spec.shape[0] not in (None, 1, *_named(spec)):
            raise InputError(
                f"no samples of chance can be made for the input {spec.name!r} ({spec.dtype}, shape {spec.shape})",
                hint="Give --samples with one array per input.",
            )
        shape = (count, *(size if isinstance(size, int) else _FREE_SIZE for size in spec.shape[1:]))
        kind = np.dtype(spec.dtype)
        if kind.kind == "f":
            inputs[spec.name] = chance.normal(size=shape).astype(kind)
        else:
            # Pixels are bytes; other integers may be indices, and of those 0 and 1 are always there.
            inputs[spec.name] = chance.integers(0, 256 if kind == np.uint8 else 2, size=shape).astype(kind)
    return inputs


def _named(spec: TensorSpec) -> tuple[str, ...]:
    first = spec.shape[0]
    return (first,) if isinstance(first, str) else ()


def _inputs(samples: Path | None, specs: Sequence[TensorSpec] | None, *, seed: int) -> Arrays:
    return load_samples(samples).inputs if samples is not None else random_inputs(specs or (), SAMPLES, seed=seed)


def _first(inputs: Arrays, count: int) -> dict[str, NDArray[Any]]:
    return {name: array[: max(count, SAMPLES)] for name, array in inputs.items()}


def _rest_metadata(target: Target) -> list[tuple[str, str, list[int]]]:
    path = f"/v2/models/{target.model}"
    status, body = ask(target.url, path, timeout_s=_METADATA_S, tls=target.tls, headers=target.headers)
    if status != http.client.OK:
        raise ValueError(f"HTTP {status}: {body[:200].decode(errors='replace')}")
    return [(one["name"], one["datatype"], one["shape"]) for one in json.loads(body).get("inputs") or []]


def _grpc_metadata(target: Target) -> list[tuple[str, str, list[int]]]:
    from tritonclient.grpc import InferenceServerClient

    with InferenceServerClient(target.url, ssl=target.tls) as client:
        headers = {name.lower(): value for name, value in target.headers.items()}
        found = client.get_model_metadata(target.model, headers=headers, client_timeout=_METADATA_S)
    return [(one.name, one.datatype, list(one.shape)) for one in found.inputs]


def _check_amounts(*, requests: int, concurrency: int, tolerance: float, seed: int) -> None:
    for name, amount, least in (("requests", requests, 2), ("concurrency", concurrency, 2)):
        if amount < least:
            raise InputError(f"--{name} is {least} or more, not {amount}", hint="Only in company can answers be mixed.")
    if not 0 < tolerance <= 1:
        raise InputError(f"--tolerance is above 0 and at most 1, not {tolerance:g}")
    check_seed(seed)


def _plain(target: Target, found: Equivalence, *, against: str) -> dict[str, Any]:
    shown = {"url": target.url, "protocol": target.protocol, "model": target.model}
    return {"target": shown, "against": against, "passed": found.passed, **to_jsonable(found)}


def lines(told: Mapping[str, Any]) -> list[str]:
    """What was found, for people."""
    target = told["target"]
    return [
        f"{told['requests']} concurrent requests ({told['rows']} samples) to {target['model']!r} at {target['url']} "
        f"over {target['protocol']}, against {told['against']}",
        f"failed {told['failed']}, wrong {told['wrong']}, another's answer {len(told['swapped'])}; "
        f"largest deviation {told['worst']:.2e} of the output's largest value; "
        f"{told['told_apart']} samples could be told from all others",
        _outcome(told),
    ]


def _outcome(told: Mapping[str, Any]) -> str:
    if not told["passed"]:
        return f"FAILED: {told['reason']}"
    if not told["told_apart"]:
        return "passed, as far as can be told: answers are too much alike to see whether one is another's"
    return "passed: each request got its own answer"
