"""What the renderers of both servers share: a model's name, V2 datatypes, and whether a model can be batched."""

import re

from registry.errors import InputError
from registry.records import Artifact, Candidate, TensorSpec

MAX_NAME = 63
"""Longest name of a Kubernetes label, which a model's name becomes on Core 2."""
CORE2_NAME = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
"""What Core 2 takes as a name: no ``_``, which stands before a version, and no ``.``, as in ``name.pipeline``."""


def model_name_of(candidate: Candidate) -> str:
    """The model's name on a server: the variant's name in small letters, digits and ``-``, and the candidate's id.

    It fits ``[a-z0-9]([-a-z0-9]*[a-z0-9])?`` and 63 characters, and tells candidates apart.
    """
    tail = candidate.id[:8].lower()
    words = re.sub(r"[^a-z0-9]+", "-", candidate.variant_name.lower())[: MAX_NAME - len(tail) - 1].strip("-")
    return f"{words}-{tail}" if words else f"m-{tail}"


def server_name_of(candidate: Candidate) -> str:
    """The name of a Core 2 Server that is there for one candidate; short, since names of pods are made from it."""
    return f"burnish-{candidate.serving.server}-{candidate.id[:8].lower()}"


def check_core2_name(name: str, what: str) -> None:
    """Returns when Core 2 takes the name; ``what`` says in the message what it is a name of.

    Raises:
        InputError: it does not.
    """
    if len(name) > MAX_NAME or not re.fullmatch(CORE2_NAME, name):
        raise InputError(
            f"Core 2 takes no {what} named {name!r}",
            hint=f"Names have small letters, digits and -, begin and end without -, and at most {MAX_NAME} characters.",
        )


def why_not_batched(artifact: Artifact) -> str | None:
    """Why requests to this model cannot be put together in one batch, or None where they can.

    A server batches along the first dimension of every tensor. It is free in each, or the same fixed size in all
    (a session then runs that many rows at a time).
    """
    tensors = (*artifact.inputs, *artifact.outputs)
    for tensor in tensors:
        if not tensor.shape:
            return f"the tensor {tensor.name!r} is a scalar, without a batch dimension"
    fixed = {tensor.shape[0] for tensor in tensors if isinstance(tensor.shape[0], int)}
    free = [tensor.name for tensor in tensors if not isinstance(tensor.shape[0], int)]
    if fixed and (free or len(fixed) > 1):
        sizes = ", ".join(f"{tensor.name} {tensor.shape[0]}" for tensor in tensors)
        return f"its tensors do not share their first dimension ({sizes})"
    return None


def check_batching(candidate: Candidate, artifact: Artifact) -> None:
    """Returns when the candidate asks for no batching, or its model can be batched.

    Raises:
        InputError: it asks for a batch that the model cannot have, or for less than one.
    """
    size = candidate.serving.max_batch_size
    if size < 1:
        raise InputError(f"max_batch_size of {candidate.name!r} is {size}", hint="It is 1, for no batching, or more.")
    if size > 1 and (reason := why_not_batched(artifact)):
        raise InputError(
            f"{candidate.name!r} asks for batches of {size}, but {reason}.",
            hint="Serve it with max_batch_size 1, or export the model with a dynamic batch dimension.",
        )


def session_settings(candidate: Candidate) -> dict[str, str]:
    """What a served session is opened with, as strings, which is what Core 2 makes of every parameter."""
    engine = candidate.engine
    return {
        "engine": engine.name,
        "precision": engine.precision,
        "graph_level": engine.graph_level,
        "threads": str(candidate.serving.threads),
    }


def unserved(tensor: TensorSpec) -> InputError:
    """The error for a tensor whose type no session takes."""
    return InputError(
        f"the tensor {tensor.name!r} is of type {tensor.dtype}, which cannot be served",
        hint="Export the model with tensors of numbers, float16 to float64 or integers, at its edges.",
    )
