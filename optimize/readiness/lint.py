"""A model file checked by the rules, in a child process: the file may be damaged, or worse."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optimize.admission import ENTRY, admit, ask_child
from optimize.readiness import models, operators, precisions, quantization, serving, shapes
from optimize.readiness.graph import Graph
from optimize.readiness.profile import parse_shapes
from optimize.readiness.releases import tensorrt_version, triton_release
from optimize.readiness.rules import Finding, Precision, Rule, Target, apply_rules
from optimize.readiness.serving import parse_config, profile_in
from optimize.readiness.triton import check_triton
from registry.errors import InputError

RULES: tuple[Rule, ...] = (
    *models.RULES,
    *operators.RULES,
    *precisions.RULES,
    *quantization.RULES,
    *shapes.RULES,
    *serving.RULES,
)
"""All rules for TensorRT, by id."""


def lint(
    model: Path,
    *,
    tensorrt: str | None = None,
    triton: str | None = None,
    shapes: Sequence[str] = (),
    precision: Precision | None = None,
    max_batch_size: int | None = None,
    config: Path | None = None,
) -> list[dict[str, Any]]:
    """Findings in a model file as plain values (see `Finding`), errors first.

    Args:
        model: an ONNX file that nobody has vouched for.
        tensorrt: the version to check for (``10``, ``11``, ``10.14``).
        triton: the release to check for (``23.03``).
        shapes: ``input=min,opt,max`` of the profile that an engine is to be built for. Where they are left out, those
            that ``config`` gives ONNX Runtime's TensorRT provider.
        precision: what an engine is to compute in.
        max_batch_size: of the server; 0 where it does not batch. Where it is left out, that of ``config``.
        config: Triton's ``config.pbtxt`` that serves the model on a GPU.

    Raises:
        InputError: neither target is given, one is unknown, or a file is no model or configuration.
        UntrustedModelError: the model asks for more than a model may.
    """
    if tensorrt is None and triton is None:
        raise InputError("nothing to check for", hint="Give --tensorrt 10, --tensorrt 11 or --triton 23.03.")
    if tensorrt is not None:
        tensorrt_version(tensorrt)
    if triton is not None:
        triton_release(triton)
    parse_shapes(shapes)
    text = None if config is None else _config_text(config, tensorrt)
    found: list[dict[str, Any]] = ask_child(
        "optimize.readiness.lint:lint_here",
        model,
        tensorrt=tensorrt,
        triton=triton,
        shapes=list(shapes),
        precision=precision,
        max_batch_size=max_batch_size,
        config=text,
    )
    return found


def _config_text(path: Path, tensorrt: str | None) -> str:
    if tensorrt is None:
        raise InputError("a configuration is checked for TensorRT", hint="Give --tensorrt 10 or --tensorrt 11, too.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}", hint="Name the config.pbtxt of the model.") from error
    parse_config(text)
    return text


def lint_here(
    *,
    path: str,
    tensorrt: str | None,
    triton: str | None,
    shapes: list[str],
    precision: Precision | None,
    max_batch_size: int | None,
    config: str | None = None,
) -> list[dict[str, Any]]:
    """What `lint` finds, in this process, which is a child."""
    parsed = None if config is None else parse_config(config)
    if parsed is not None and max_batch_size is None:
        max_batch_size = parsed.max_batch_size
    with tempfile.TemporaryDirectory(prefix="burnish-lint-") as folder:
        admit(Path(path), Path(folder))
        graph = load_graph(Path(folder) / ENTRY)
        findings: tuple[Finding, ...] = ()
        if tensorrt is not None:
            target = Target(
                tensorrt=tensorrt_version(tensorrt),
                profile=parse_shapes(shapes) if shapes else profile_in(parsed),
                precision=precision,
                max_batch_size=max_batch_size,
                config=parsed,
            )
            findings += apply_rules(RULES, graph, target)
        if triton is not None:
            findings += check_triton(graph, triton)
        return [asdict(finding) for finding in findings]


def load_graph(path: Path) -> Graph:
    """The view of a model file that was let in; weights in other files are read when a rule asks for them."""
    import onnx

    return Graph(onnx.load(str(path), load_external_data=False), path.parent)
