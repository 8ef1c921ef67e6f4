"""The door for ONNX files that nobody has vouched for: what a model may not do, found before anything runs it.

A file that is let in declares no more bytes than it brings, reads no file outside its folder, and calls only operators
that the engines here know. Its parts are copied first and checked afterwards, so that what was checked is what is used.
"""

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Literal

from optimize.engines.local import ChildFailure, Limits, run_in_child
from optimize.protobuf_wire import length_fields, mapped
from optimize.signature import Described, Signature, describe_signature, read_signature
from registry.errors import InputError, StorageError, UntrustedModelError

if TYPE_CHECKING:
    import onnx

Format = Literal["onnx", "openvino"]

ENTRY = "model.onnx"
KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"})
MOST_NODES = 500_000  # with the functions inside of the model written out
MOST_FIELDS = 10 * MOST_NODES  # names, attributes and other parts of nodes and graphs
MOST_PROTOBUF_BYTES = 2**31 - 1
MOST_SPARSE_BYTES = 256 * 10**6  # of all sparse tensors, which engines unfold when they load them
MOST_SHARED_BYTES = (
    256 * 10**6
)  # that external tensors may declare beyond twice what their files hold: they may overlap

# Operators that hand over to files or code which a graph cannot show.
_OPAQUE_OPERATORS = frozenset({"EPContext", "PyOp"})

_PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".bin"})
_FACTORY_HINT = "Name a function that builds the module (torch: package.module:factory), or export it to ONNX first."
_OTHERS = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes; it holds pickles, and burnish unpickles nothing"),
    (b"\x89HDF", "an HDF5 file, as Keras writes"),
    (b"GGUF", "a GGUF file"),
    (b"TFL3", "a TensorFlow Lite file"),
)

_BITS = {
    "FLOAT": 32, "DOUBLE": 64, "FLOAT16": 16, "BFLOAT16": 16, "COMPLEX64": 64, "COMPLEX128": 128, "BOOL": 8,
    "INT8": 8, "INT16": 16, "INT32": 32, "INT64": 64, "UINT8": 8, "UINT16": 16, "UINT32": 32, "UINT64": 64,
    "INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2,
    "FLOAT8E4M3FN": 8, "FLOAT8E4M3FNUZ": 8, "FLOAT8E5M2": 8, "FLOAT8E5M2FNUZ": 8, "FLOAT8E8M0": 8,
}  # fmt: skip


def admit(path: Path, folder: Path) -> Signature:
    """Copies a model into ``folder`` as ``model.onnx``, its external data beside it, and returns its signature.

    Args:
        path: the ONNX file. It may be a link; what it names may not lead out of the folder it stands in.
        folder: an empty folder.

    Raises:
        InputError: there is no such file, or it is not a whole and valid ONNX model.
        UntrustedModelError: it is a pickle, reads files outside its folder, declares more than it holds, or calls
            operators of an unknown domain.
    """
    refuse_other_formats(path)
    copy = folder / ENTRY
    _copy(path, copy)
    with _naming(path):
        model = parse(copy, path.name)
        _check_sparse(model)
        tensors = list(_tensors(model))
        outside = [tensor for tensor in tensors if _is_external(tensor)]
        for location in sorted(set(map(_location, outside))):
            _copy_external(location, path.parent, folder)
        for tensor in tensors:
            _check_size(tensor, folder)
        _check_shared(outside, folder)
        _check_opset(model)
        _check_operators(model)
        _check_by_onnx(copy, path.name)
        _check_written_out(model)
        return read_signature(copy)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Has each refusal say which file it is of."""
    try:
        yield
    except InputError as error:
        if path.name in error.message:
            raise
        raise type(error)(f"{path.name}: {error.message}", hint=error.hint) from error


def admit_openvino(path: Path, folder: Path) -> Signature:
    """Copies an OpenVINO ``.xml`` and its ``.bin`` into ``folder``, and returns the copy's signature.

    Raises:
        InputError: one of the two is missing, or they are no OpenVINO model.
        UntrustedModelError: the ``.bin`` is a link that leads out of the folder.
    """
    weights = path.with_suffix(".bin")
    for file in (path, weights):
        if not file.is_file():
            raise InputError(f"{path} has no {file.name} beside it", hint="OpenVINO keeps weights in a .bin file.")
    _refuse_link_outside(weights.resolve(), weights.name, path.parent)
    for file in (path, weights):
        _copy(file, folder / file.name)
    return read_signature(folder / path.name)


def admit_here(*, path: str, folder: str, format: Format = "onnx") -> Described:
    """Lets a model in, in this process, which is a child: by `admit`, or for ``openvino`` by `admit_openvino`."""
    admit_it = admit_openvino if format == "openvino" else admit
    return describe_signature(admit_it(Path(path), Path(folder)))


def ask_child(function: str, path: Path, *, limits: Limits | None = None, **arguments: Any) -> Any:
    """What a function finds out about a model that nobody has vouched for, in a child process with limits.

    Args:
        function: ``package.module:function``, called with the absolute ``path`` as text, and the arguments.
        path: the model file.
        limits: of the child.
        arguments: the function's others.

    Raises:
        BurnishError: what the function raised.
        UntrustedModelError: reading the model broke a limit, or crashed.
    """
    try:
        return run_in_child(function, {"path": str(path.absolute()), **arguments}, limits=limits)
    except ChildFailure as error:
        if error.kind == "error":
            raise
        log = f"\n{error.log}" if error.log else ""
        raise UntrustedModelError(f"{path} cannot be read: {error.message}{log}") from error


def refuse_other_formats(path: Path) -> None:
    """Returns when the file may be an ONNX model, going by its name and first bytes.

    Raises:
        InputError: it is missing, a folder, empty, too large, or something else.
        UntrustedModelError: it is a pickle.
    """
    if path.is_dir():
        hint = "Name it under 'huggingface' instead of 'onnx'." if (path / "config.json").is_file() else None
        raise InputError(f"{path} is a folder, not an ONNX file", hint=hint)
    if not path.is_file():
        raise InputError(f"no model at {path}")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(16)
    if not size:
        raise InputError(f"{path} is empty, not an ONNX model")
    if _is_pickle(head) or path.suffix.lower() in _PICKLE_SUFFIXES:
        raise UntrustedModelError(
            f"{path} is not an ONNX model but a pickle; burnish unpickles nothing", hint=_FACTORY_HINT
        )
    for magic, what in _OTHERS:
        if magic in head[:8]:
            raise UntrustedModelError(f"{path} is not an ONNX model but {what}", hint=_FACTORY_HINT)
    if path.suffix.lower() == ".safetensors":
        raise InputError(
            f"{path} holds weights only, without the graph that uses them",
            hint="Name the Hugging Face folder that it belongs to, or a factory that loads it.",
        )
    if size > MOST_PROTOBUF_BYTES:
        raise InputError(
            f"{path} has {size:,} bytes; one ONNX file holds less than 2 GiB",
            hint="Save it with its weights as external data.",
        )


def _is_pickle(head: bytes) -> bool:
    """Whether these bytes start a pickle of protocol 2 to 5."""
    return len(head) >= 2 and head[0] == 0x80 and 2 <= head[1] <= 5


def parse(path: Path, name: str) -> "onnx.ModelProto":
    """The model in a file, without weights in other files, after its nodes were counted; a child's work.

    Args:
        path: the file.
        name: what messages call it.

    Raises:
        InputError: it is no ONNX model, or only part of one.
        UntrustedModelError: it has more nodes than burnish takes.
    """
    import onnx
    from google.protobuf.message import DecodeError

    _check_counts(path, name)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError, RecursionError) as error:
        raise _not_whole(name, error) from error
    if not model.ir_version or not model.graph.output or not (model.opset_import or model.ir_version < 3):
        raise InputError(f"{name} is not an ONNX model: it has no IR version, opset or outputs")
    return model


# --- counting --------------------------------------------------------------------------------------------------

# The messages of onnx.proto that hold nodes: message -> field number -> the message in that field. "" is any other.
_HOLDS: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node"},
    "node": {5: "attribute"},
    "attribute": {6: "graph", 11: "graph"},
}


def _check_counts(path: Path, name: str) -> None:
    """Counts nodes in the bytes of the file: parsed, an empty node of two bytes would take a hundred."""
    nodes = fields = 0
    with mapped(path) as data:
        waiting = [("model", 0, len(data))]
        try:
            while waiting:
                message, begin, end = waiting.pop()
                for field, start, stop in length_fields(data, begin, end):
                    fields += 1
                    inner = _HOLDS[message].get(field, "")
                    nodes += inner == "node"
                    if inner:
                        waiting.append((inner, start, stop))
                    if nodes > MOST_NODES or fields > MOST_FIELDS:
                        raise UntrustedModelError(
                            f"{name} has more nodes or parts of nodes than burnish takes ({MOST_NODES:,} nodes, "
                            f"{MOST_FIELDS:,} parts)"
                        )
        except ValueError as error:
            raise _not_whole(name, error) from error


def _not_whole(name: str, why: object) -> InputError:
    return InputError(f"{name} is not an ONNX model, or only part of one: {why}")


def _check_written_out(model: "onnx.ModelProto") -> None:
    """Counts nodes as if every call of a function inside of the model were replaced by its nodes, as engines do.

    Functions that call each other twice double with each level. The checker has refused those that call themselves.
    """
    bodies = {(function.domain, function.name): function for function in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size(graph: Any) -> int:
        total = 0
        for part in _with_inner(graph):
            for node in part.node:
                called = (node.domain, node.op_type)
                if called in bodies and called not in sizes:
                    sizes[called] = size(bodies[called])
                total += sizes.get(called, 1)
        return total

    try:
        count = size(model.graph)
    except RecursionError as error:
        raise UntrustedModelError("functions inside of the model call each other too deeply") from error
    if count > MOST_NODES:
        raise UntrustedModelError(
            f"the model has {count:,} nodes when its functions are written out; {MOST_NODES:,} are the most"
        )


# --- walking ---------------------------------------------------------------------------------------------------


def _graphs(model: "onnx.ModelProto") -> Iterator[Any]:
    """Every graph and function of the model, those inside of nodes too."""
    outer: list[Any] = [model.graph, *model.functions]
    for training in model.training_info:
        outer += [training.initialization, training.algorithm]
    for graph in outer:
        yield from _with_inner(graph)


def _with_inner(graph: Any) -> Iterator[Any]:
    """A graph or function, and the graphs inside of its nodes."""
    waiting = [graph]
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                waiting += [*attribute.graphs]
                if attribute.HasField("g"):
                    waiting.append(attribute.g)


def _tensors(model: "onnx.ModelProto") -> Iterator["onnx.TensorProto"]:
    """Every tensor that the model brings: initializers, and attributes of nodes and of functions."""
    for graph in _graphs(model):
        yield from getattr(graph, "initializer", ())
        for attribute in _attributes(graph):
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t
    for sparse in _sparse_tensors(model):
        yield from (sparse.values, sparse.indices)


def _sparse_tensors(model: "onnx.ModelProto") -> Iterator["onnx.SparseTensorProto"]:
    for graph in _graphs(model):
        yield from getattr(graph, "sparse_initializer", ())
        for attribute in _attributes(graph):
            yield from attribute.sparse_tensors
            if attribute.HasField("sparse_tensor"):
                yield attribute.sparse_tensor


def _attributes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield from node.attribute
    yield from getattr(graph, "attribute_proto", ())


def _check_sparse(model: "onnx.ModelProto") -> None:
    unfolded = 0
    for sparse in _sparse_tensors(model):
        unfolded += _bytes_needed(sparse.dims, sparse.values.data_type, sparse.values.name)
        if unfolded > MOST_SPARSE_BYTES:
            raise UntrustedModelError(
                f"with {sparse.values.name!r}, the model's sparse tensors unfold to {unfolded:,} bytes; "
                f"{MOST_SPARSE_BYTES:,} are the most"
            )


def _check_opset(model: "onnx.ModelProto") -> None:
    from onnx import defs

    for entry in model.opset_import:
        if entry.domain in {"", "ai.onnx"} and not 1 <= entry.version <= defs.onnx_opset_version():
            raise InputError(
                f"the model is of opset {entry.version}; burnish knows opsets 1 to {defs.onnx_opset_version()}",
                hint="Export it again with an opset that there is.",
            )


def _check_operators(model: "onnx.ModelProto") -> None:
    own = {function.domain for function in model.functions}
    for graph in _graphs(model):
        for node in graph.node:
            if node.op_type in _OPAQUE_OPERATORS:
                raise UntrustedModelError(
                    f"the node {node.name!r} is a {node.op_type}, which runs what the graph does not show"
                )
            if node.domain not in KNOWN_DOMAINS | own:
                raise UntrustedModelError(
                    f"the node {node.name!r} calls {node.op_type} of the unknown domain {node.domain!r}",
                    hint=f"Known are {', '.join(sorted(KNOWN_DOMAINS - {''}))} and functions inside of the model.",
                )


def _check_by_onnx(path: Path, name: str) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # the checker raises its own error and others, for one and the same reason
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(f"{name} is not a valid ONNX model: {' '.join(lines[:2])}") from error


# --- sizes and external data -----------------------------------------------------------------------------------


def _bytes_needed(dims: Iterable[int], data_type: int, name: str) -> int:
    """Bytes of a tensor of numbers of these dimensions; for strings, one byte each."""
    import onnx

    shape = list(dims)
    if any(dim < 0 for dim in shape):
        raise UntrustedModelError(f"the tensor {name!r} has the negative shape {shape}")
    known = {number: kind for kind, number in onnx.TensorProto.DataType.items()}
    bits = _BITS.get(known.get(data_type, ""), 8)
    return -(-prod(shape) * bits // 8)


def _check_size(tensor: "onnx.TensorProto", folder: Path) -> None:
    """Returns when the tensor holds what its shape declares."""
    need = _bytes_needed(tensor.dims, tensor.data_type, tensor.name)
    if _is_external(tensor):
        have = _external_bytes(tensor, folder)
    elif tensor.HasField("raw_data"):
        have = len(tensor.raw_data)
    else:
        have = _typed_bytes(tensor)
    if have < need:
        raise UntrustedModelError(
            f"the tensor {tensor.name!r} of shape {list(tensor.dims)} declares {need:,} bytes and holds {have:,}",
            hint="The file is damaged, or made to exhaust memory.",
        )


def _typed_bytes(tensor: "onnx.TensorProto") -> int:
    """Bytes of the values in the fields that have a type, each counted as the tensor's type has it."""
    import onnx

    kind = {number: kind for kind, number in onnx.TensorProto.DataType.items()}.get(tensor.data_type, "")
    bits = _BITS.get(kind, 8)
    values = len(tensor.int32_data) + len(tensor.int64_data) + len(tensor.uint64_data) + len(tensor.string_data)
    # An entry of int32_data packs as many narrow values as a byte has room for; complex numbers take two entries.
    each = 1.0 if bits < 8 else bits / 8
    real = bits / 16 if kind.startswith("COMPLEX") else bits / 8
    return int(values * each + (len(tensor.float_data) + len(tensor.double_data)) * real)


def _is_external(tensor: "onnx.TensorProto") -> bool:
    import onnx

    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _entry(tensor: "onnx.TensorProto", key: str) -> str | None:
    return next((entry.value for entry in tensor.external_data if entry.key == key), None)


def _location(tensor: "onnx.TensorProto") -> str:
    location = _entry(tensor, "location")
    if not location:
        raise UntrustedModelError(f"the tensor {tensor.name!r} is kept outside of the model, but nothing says where")
    return location


def _inside(location: str) -> PurePosixPath:
    """The location as a relative path that does not climb."""
    path = PurePosixPath(location)
    climbs = path.is_absolute() or ".." in path.parts or "\\" in location or PureWindowsPath(location).drive
    if climbs or "\0" in location or path == PurePosixPath() or path == PurePosixPath(ENTRY):
        raise UntrustedModelError(
            f"the model keeps weights in {location!r}; external data stays inside of the model's folder",
            hint="Save it again with onnx.save(..., save_as_external_data=True, location='model.onnx.data').",
        )
    return path


def _copy_external(location: str, origin: Path, folder: Path) -> None:
    relative = _inside(location)
    source = origin / relative
    try:
        real = source.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"the model keeps weights in {location!r}, which is not beside it in {origin}") from error
    _refuse_link_outside(real, location, origin)
    if not real.is_file():
        raise UntrustedModelError(f"the model keeps weights in {location!r}, which is no regular file")
    target = folder / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    _copy(real, target)


def _refuse_link_outside(real: Path, location: str, origin: Path) -> None:
    if not real.is_relative_to(origin.resolve()):
        raise UntrustedModelError(
            f"the model keeps weights in {location!r}, a link to {real}; external data stays inside of the model's "
            "folder",
            hint="Copy the model and its data into one folder, without links.",
        )


def _copy(source: Path, target: Path) -> None:
    """Copies a file that the disk has room for; one with holes may be larger than any disk."""
    stat, free = source.stat(), shutil.disk_usage(target.parent).free
    size, held = stat.st_size, stat.st_blocks * 512
    if size > free:
        told = f"{source} has {size:,} bytes, and the disk of {target.parent} has {free:,} left"
        if held <= size // 2:
            raise InputError(f"{told}; of its own, it takes {held:,}", hint="The file is made to exhaust the disk.")
        raise StorageError(told, hint="Make room there, or name another working folder by --work.")
    shutil.copyfile(source, target)


def _check_shared(tensors: list["onnx.TensorProto"], folder: Path) -> None:
    """Returns when external tensors declare about as much as their files hold; the same bytes may serve several."""
    declared = sum(_bytes_needed(tensor.dims, tensor.data_type, tensor.name) for tensor in tensors)
    files = {folder / _inside(_location(tensor)) for tensor in tensors}
    held = sum(file.stat().st_size for file in files)
    if declared > 2 * held + MOST_SHARED_BYTES:
        raise UntrustedModelError(
            f"the model's external tensors declare {declared:,} bytes, and their files hold {held:,}",
            hint="The file is made to exhaust memory: many tensors are the same bytes.",
        )


def _external_bytes(tensor: "onnx.TensorProto", folder: Path) -> int:
    """Bytes of the external data that are there for the tensor."""
    size = (folder / _inside(_location(tensor))).stat().st_size
    try:
        offset = int(_entry(tensor, "offset") or 0)
        length = int(_entry(tensor, "length") or max(0, size - offset))
    except ValueError as error:
        raise UntrustedModelError(f"the tensor {tensor.name!r} has external data at no number: {error}") from error
    if offset < 0 or length < 0:
        raise UntrustedModelError(f"the tensor {tensor.name!r} has external data at the negative place {offset}")
    return max(0, min(length, size - offset))


def external_files(path: Path | str) -> list[str]:
    """The files that an ONNX model keeps weights in, as it names them, sorted; they are inside of its folder.

    It parses the model: a child's work.

    Raises:
        InputError: it cannot be parsed.
        UntrustedModelError: it names a file outside of its folder.
    """
    with _naming(Path(path)):
        tensors = _tensors(parse(Path(path), Path(path).name))
        return sorted({str(_inside(_location(tensor))) for tensor in tensors if _is_external(tensor)})
