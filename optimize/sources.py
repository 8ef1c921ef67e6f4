"""Models as users have them, turned into float32 ONNX artifacts in the store.

A model is untrusted until it is in the store. Whatever reads or runs it on the way does so in a child process with
limits, `optimize.admission` says what an ONNX file may not do, and nothing is unpickled.
"""

import ast
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, Literal

from optimize.admission import ENTRY, ask_child, refuse_other_formats
from optimize.engines.local import Limits, run_in_child
from optimize.export import kept_files
from optimize.packages import PackageNotFoundError, version
from optimize.signature import signature_of
from registry.codec import file_sha256
from registry.errors import InputError
from registry.ports import Store
from registry.records import Artifact, Source

Kind = Literal["onnx", "torch", "huggingface"]

_TORCH_TOOLS = ("torch", "onnx", "onnxscript", "onnx-ir")
_HUGGINGFACE_TOOLS = ("torch", "onnx", "transformers", "optimum", "optimum-onnx")
_METHOD = 1  # raised when an export is done in another way, so that results of the old one are not used


def load_onnx(name: str, path: Path, store: Store, work: Path, *, limits: Limits | None = None) -> Source:
    """The source that an ONNX file is, let in and kept as ``model.onnx`` with its external data.

    Args:
        name: the source's name in the campaign.
        path: the ONNX file.
        store: where the artifact is kept.
        work: a folder for what is in the making.
        limits: of the child process that reads it.

    Raises:
        InputError: there is no such file, or it is not a whole and valid ONNX model.
        UntrustedModelError: it is a pickle, or asks for more than a model may; see `optimize.admission`.
        ChildFailure: reading it broke a limit, or crashed.
    """
    refuse_other_formats(path)
    arguments = {"path": str(path.absolute())}
    function = "optimize.admission:admit_here"
    return _load(name, "onnx", str(path), function, arguments, store=store, work=work, limits=limits)


def load_torch(
    name: str,
    factory: str,
    store: Store,
    work: Path,
    *,
    samples: Path,
    python_path: Path | None = None,
    opset: int | None = None,
    seed: int = 0,
    limits: Limits | None = None,
) -> Source:
    """The source that a torch module is, exported by torch's dynamo exporter with any batch.

    Its outputs have the names of the keys that ``forward`` returns, or ``output``.

    Args:
        name: the source's name in the campaign.
        factory: ``package.module:function``; called without arguments, it returns a module, or a pair of a module and
            its example inputs.
        store: where the artifact is kept.
        work: a folder for what is in the making.
        samples: ``.npz`` whose arrays name the inputs, and are the example where the factory gives none.
        python_path: the folder that the factory's package is in, appended to the module search path.
        opset: of the ONNX model, or None for the exporter's own.
        seed: of torch's random numbers before the factory is called.
        limits: of the child process.

    Raises:
        InputError: the factory cannot be found or called, or its inputs do not fit.
        StageError: the module cannot be exported, or the exported model answers otherwise.
        ChildFailure: the export broke a limit, or crashed.
    """
    arguments = {
        "factory": factory,
        "samples": str(samples.absolute()),
        "opset": opset,
        "seed": seed,
    }
    function = "optimize.export:export_torch"
    return _load(
        name, "torch", factory, function, arguments, store=store, work=work, limits=limits, python_path=python_path
    )


def load_huggingface(
    name: str,
    folder: Path,
    store: Store,
    work: Path,
    *,
    task: str = "feature-extraction",
    pooling: Literal["mean", "cls"] | None = None,
    normalize: bool = False,
    opset: int | None = None,
    allow_pickle: bool = False,
    limits: Limits | None = None,
) -> Source:
    """The source that a Hugging Face folder is, exported by optimum without network and without its code.

    Args:
        name: the source's name in the campaign.
        folder: the folder with ``config.json`` and safetensors.
        store: where the artifact is kept.
        work: a folder for what is in the making.
        task: optimum's name of the task.
        pooling: ends the graph with one vector a row, the output ``embedding`` (batch, hidden): the ``mean`` of the
            tokens that the attention mask keeps, or the first token's (``cls``). None leaves the outputs.
        normalize: whether that vector is scaled to length 1.
        opset: of the ONNX model, or None for the exporter's own.
        allow_pickle: whether weights in ``.bin`` and ``.pt`` files may be read, by torch's weights-only reader.
        limits: of the child process.

    Raises:
        InputError: the folder, task or pooling does not fit.
        UntrustedModelError: its weights are pickles, or it asks for code of its own.
        StageError: optimum cannot export it, or the exported model answers otherwise.
        ChildFailure: the export broke a limit, or crashed.
    """
    kept_files(folder, allow_pickle=allow_pickle)
    if normalize and pooling is None:
        raise InputError(f"{name}: 'normalize' scales the embedding that 'pooling' makes, and there is no pooling")
    arguments = {
        "source": str(folder.absolute()),
        "task": task,
        "pooling": pooling,
        "normalize": normalize,
        "opset": opset,
        "allow_pickle": allow_pickle,
    }
    function = "optimize.export:export_huggingface"
    return _load(name, "huggingface", str(folder), function, arguments, store=store, work=work, limits=limits)


def _load(
    name: str,
    kind: Kind,
    location: str,
    function: str,
    arguments: Mapping[str, Any],
    *,
    store: Store,
    work: Path,
    limits: Limits | None,
    python_path: Path | None = None,
) -> Source:
    with _scratch(work) as folder:
        made = run_in_child(function, {**arguments, "folder": str(folder)}, limits=limits, python_path=python_path)
        inputs, outputs = signature_of(made)
        artifact = store.add(folder, format="onnx", entry=ENTRY, inputs=inputs, outputs=outputs)
    return Source(name=name, kind=kind, location=location, digest=_source_digest(artifact), artifact=artifact)


@contextmanager
def _scratch(work: Path) -> Iterator[Path]:
    """An empty folder for the model alone, removed afterwards; beside it there is room for what is in the making."""
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="source-", dir=work) as name:
        folder = Path(name).absolute() / "model"
        folder.mkdir()
        yield folder


def _source_digest(artifact: Artifact) -> str:
    """The digest of the ONNX file, or of all files where the weights stand beside it."""
    return artifact.files[0].sha256 if len(artifact.files) == 1 else artifact.digest


# --- what a source depends on ----------------------------------------------------------------------------------


def source_components(
    kind: Kind,
    location: str,
    *,
    samples: Path | None = None,
    python_path: Path | None = None,
    depends_on: Sequence[Path] = (),
    **options: Any,
) -> dict[str, Any]:
    """What a source depends on, by name: equal components mean the same artifact, so that no export is needed.

    Args:
        kind: how the source is given.
        location: the path, or ``package.module:factory``.
        samples: torch: the file that the example inputs come from; their names, types and shapes count.
        python_path: torch: the folder that the factory's package is in.
        depends_on: files that the factory reads (weights, say): they cannot be seen from its code.
        options: the others that go to ``load_onnx``, ``load_torch`` or ``load_huggingface``.

    Raises:
        InputError: what the source is made of cannot be found.
    """
    found: dict[str, Any] = {"kind": kind, "method": _METHOD, **options}
    if kind == "onnx":
        return found | {"files": _onnx_files(Path(location))}
    if kind == "huggingface":
        kept = kept_files(Path(location), allow_pickle=bool(options.get("allow_pickle")))
        return found | {"files": {file.name: sha256_of(file) for file in kept}, "tools": _tools(_HUGGINGFACE_TOOLS)}
    return found | {
        "factory": location,
        "files": code_digests(location, python_path),
        "reads": {str(path): sha256_of(path) for path in depends_on},
        "examples": None if samples is None else _example_shapes(samples),
        "tools": _tools(_TORCH_TOOLS),
    }


def _onnx_files(path: Path) -> dict[str, str]:
    """Digest of the model, and of the external data it names inside of its folder."""
    refuse_other_formats(path)
    locations = ask_child("optimize.admission:external_files", path)
    if missing := [location for location in locations if not (path.parent / location).is_file()]:
        raise InputError(
            f"{path} keeps weights in {missing[0]!r}, which is not beside it",
            hint="Copy the model together with the files of its weights.",
        )
    beside = {location: sha256_of(path.parent / location) for location in locations}
    return {ENTRY: sha256_of(path), **beside}


def _example_shapes(samples: Path) -> dict[str, list[Any]]:
    from optimize.samples import load_samples

    return {name: [str(array.dtype), *array.shape[1:]] for name, array in load_samples(samples).inputs.items()}


def _tools(names: Sequence[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file.

    Raises:
        InputError: it is not there, no regular file, or cannot be read.
    """
    if not path.is_file():
        raise InputError(f"{path} is not there, or no regular file")
    try:
        return file_sha256(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def code_digests(reference: str, python_path: Path | None) -> dict[str, str]:
    """SHA-256 (hex) of the Python files behind a function of the user's, by module name; nothing is imported.

    Args:
        reference: ``package.module:function``.
        python_path: the folder that the function's package is in, searched after the installed ones, or None.

    Returns:
        Those of the module and of all that it imports from its own package or from ``python_path``; nothing where
        the module is compiled.

    Raises:
        InputError: there is no such module, or a file of it cannot be read.
    """
    module = reference.partition(":")[0]
    files = _module_files(module, python_path)
    if not files and _find(module, _search(python_path)) is None:
        raise InputError(
            f"{reference!r}: no module named {module!r}", hint="Put it beside the campaign file, or install it."
        )
    return {name: sha256_of(file) for name, file in sorted(files.items())}


def _search(python_path: Path | None) -> list[str]:
    return [entry for entry in sys.path if entry] + ([str(python_path)] if python_path else [])


def _module_files(module: str, python_path: Path | None) -> dict[str, Path]:
    """Module name -> file, of a module and of all it imports from its own package or from ``python_path``.

    Nothing is imported: the files are found as Python finds them, and their imports read from their syntax.
    """
    search = _search(python_path)
    root = module.partition(".")[0]
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        spec = None if name in found else _find(name, search)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        file = Path(spec.origin)
        ours = name.partition(".")[0] == root
        if not ours and (python_path is None or not file.is_relative_to(python_path.absolute())):
            continue
        found[name] = file
        waiting += [name.rpartition(".")[0]] if "." in name else []
        waiting += _imports(file, name if file.name == "__init__.py" else name.rpartition(".")[0])
    return found


def _find(name: str, search: Sequence[str]) -> ModuleSpec | None:
    top, *parts = name.split(".")
    spec = PathFinder.find_spec(top, list(search)) or _find_otherwise(top)
    for part in parts:
        if spec is None or not spec.submodule_search_locations:
            return None
        # By its last part: a namespace package of a dotted name would ask for its parent, which is not imported.
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    return spec


def _find_otherwise(name: str) -> ModuleSpec | None:
    """A module that is on no path: built in, or of a package installed in place (``pip install -e``)."""
    found = (finder.find_spec(name, None) for finder in sys.meta_path if finder is not PathFinder)
    return next((spec for spec in found if spec is not None), None)


def _imports(file: Path, package: str) -> list[str]:
    """The modules that a file may import, by its syntax; of ``from a import b`` both ``a`` and ``a.b``."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []  # importing it will say so
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return [name for name in names if name and not name.startswith(".")]
