"""Torch modules and Hugging Face folders to ONNX; runs in the child process that `optimize.sources` starts."""

import inspect
import json
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from optimize.admission import ENTRY
from optimize.engines.child import resolve
from optimize.samples import load_samples
from optimize.signature import Described, describe_signature, read_signature
from registry.errors import InputError, MissingExtraError, StageError, UntrustedModelError

if TYPE_CHECKING:
    import onnx
    import torch

_EXAMPLES = 4
_MOST_IN_ONE_FILE = 1_800_000_000
_TOLERANCE = 1e-3  # of the largest answer; exporters reorder sums, and no more

# What a Hugging Face folder may bring into an export. Everything else, and so pickles and code, stays outside.
_KEPT_SUFFIXES = frozenset({".json", ".txt", ".safetensors", ".model"})
_PICKLED_WEIGHTS = frozenset({".bin", ".pt", ".pth"})


def tidy(model: "onnx.ModelProto") -> None:
    """Removes what exporters note for people: it holds paths of this machine, and differs where the model does not."""
    model.ClearField("doc_string")
    model.ClearField("metadata_props")
    waiting: list[Any] = [model.graph, *model.functions]
    while waiting:
        part = waiting.pop()
        for field in ("doc_string", "metadata_props"):
            if field in part.DESCRIPTOR.fields_by_name:
                part.ClearField(field)
        for field in ("node", "initializer", "input", "output", "value_info", "attribute"):
            values = getattr(part, field, ())
            waiting += [value for value in values if hasattr(value, "DESCRIPTOR")]
        if part.DESCRIPTOR.name == "AttributeProto":
            waiting += [*part.graphs, *([part.g] if part.HasField("g") else [])]


# --- torch -----------------------------------------------------------------------------------------------------


def export_torch(
    *,
    factory: str,
    samples: str,
    folder: str,
    opset: int | None,
    seed: int,
) -> Described:
    """Exports the module that a factory returns to ``model.onnx``, with any batch, and checks it against the module.

    The outputs are named as the keys of the dict that ``forward`` returns, or ``output``.

    Args:
        factory: ``package.module:function``; called without arguments, it returns a ``torch.nn.Module``, or a pair of
            one and its example inputs (a tuple of tensors, or name -> tensor).
        samples: ``.npz`` whose arrays are the example inputs where the factory gives none. Names that are parameters
            of ``forward`` go there; otherwise the arrays go in their order.
        folder: where the files are written.
        opset: of the ONNX model, or None for the exporter's own.
        seed: of torch's random numbers before the factory is called.

    Raises:
        InputError: the factory cannot be found or called, or its inputs do not fit.
        StageError: the module cannot be exported, or the exported model answers otherwise.
        MissingExtraError: torch or onnxscript is not installed.
    """
    module, examples = make_module(factory, samples=Path(samples), seed=seed)
    return export_module(module, examples, Path(folder), factory=factory, opset=opset)


def make_module(factory: str, *, samples: Path, seed: int) -> tuple["torch.nn.Module", dict[str, "torch.Tensor"]]:
    """The module that a factory returns, in evaluation mode, and input name -> example of four rows.

    Args:
        factory: as `export_torch` takes it.
        samples: the ``.npz`` of the example inputs, where the factory gives none.
        seed: of torch's random numbers before the factory is called.

    Raises:
        InputError: the factory cannot be found or called, or its inputs do not fit.
        MissingExtraError: torch or onnxscript is not installed.
    """
    try:
        import onnxscript  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("exporting a torch module", extra="torch") from error

    module, given = _made(factory, seed)
    return module, _examples(module, given, samples, factory)


def export_module(
    module: "torch.nn.Module", examples: Mapping[str, "torch.Tensor"], folder: Path, *, factory: str, opset: int | None
) -> Described:
    """Exports a module as `export_torch` does, with examples from `make_module`.

    Raises:
        InputError: ``forward`` raises on the examples, or answers with something else than tensors.
        StageError: the module cannot be exported, or the exported model answers otherwise.
    """
    import torch

    with torch.no_grad():
        names = _output_names(_answer(module, examples, factory))
    path = folder / ENTRY
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
    try:
        _export(module, examples, path, opset=opset, output_names=names, external=size > _MOST_IN_ONE_FILE)
    except Exception as error:  # the exporter's errors have many classes and share only their origin
        traceback.print_exc()
        raise StageError(
            f"{factory} cannot be exported to ONNX with any batch: {_first_line(error)}",
            hint="Shapes and Python branches must not depend on the batch size; the log has the exporter's words.",
        ) from error
    _rewrite(path, opset=opset)
    for rows in (_EXAMPLES, 1):
        _check_against(module, {name: tensor[:rows] for name, tensor in examples.items()}, path, factory)
    return describe_signature(read_signature(path))


def _first_line(error: BaseException) -> str:
    """The first line of the error at the root of a chain, which is the one that says why."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _made(factory: str, seed: int) -> tuple["torch.nn.Module", Any]:
    """The factory's module, ready to answer, and its example inputs or None."""
    import torch

    function = resolve(factory)
    torch.manual_seed(seed)
    try:
        made = function()
    except Exception as error:  # whatever a user's function raises
        traceback.print_exc()
        raise InputError(f"{factory} raised {type(error).__name__}: {error}") from error
    module, given = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, torch.nn.Module):
        raise InputError(
            f"{factory} returned {type(made).__name__}, not a torch.nn.Module",
            hint="It returns a module, or a pair of a module and its example inputs.",
        )
    return module.eval().cpu(), given


def _examples(module: "torch.nn.Module", given: Any, samples: Path, factory: str) -> dict[str, "torch.Tensor"]:
    """Input name -> example of four rows, in the order of ``forward``'s parameters where they have these names."""
    import torch

    parameters = list(inspect.signature(module.forward).parameters)
    if given is None:
        arrays = load_samples(samples).take(_EXAMPLES).inputs
        named = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    elif isinstance(given, Mapping):
        named = dict(given)
    else:
        tensors = tuple(given) if isinstance(given, tuple | list) else (given,)
        named = dict(zip(parameters, tensors, strict=False))
    if not named or not all(isinstance(tensor, torch.Tensor) and tensor.ndim for tensor in named.values()):
        raise InputError(f"the example inputs of {factory} are not tensors with the batch as their first dimension")
    if set(named) <= set(parameters):
        named = {name: named[name] for name in parameters if name in named}
    try:
        inspect.signature(module.forward).bind(*named.values())
    except TypeError as error:
        raise InputError(
            f"forward of {factory} takes {parameters}, but the example inputs are {list(named)}: {error}",
            hint="Name the arrays of the samples as forward's parameters, or return example inputs from the factory.",
        ) from error
    rows = torch.arange(_EXAMPLES)
    return {name: tensor[rows % len(tensor)] for name, tensor in named.items()}


def takes_by_name(module: "torch.nn.Module", names: Mapping[str, Any]) -> bool:
    """Whether the names are those of parameters of ``forward``."""
    return set(names) <= set(inspect.signature(module.forward).parameters)


def _call(module: "torch.nn.Module", examples: Mapping[str, "torch.Tensor"]) -> Any:
    return module(**examples) if takes_by_name(module, examples) else module(*examples.values())


def _answer(module: "torch.nn.Module", examples: Mapping[str, "torch.Tensor"], factory: str) -> Any:
    """What the module answers to the examples: tensors alone.

    Raises:
        InputError: it raises, or there is something else among its answers.
    """
    import torch

    try:
        answer = _call(module, examples)
    except Exception as error:  # whatever a user's module raises
        traceback.print_exc()
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in examples.items())
        raise InputError(
            f"forward of {factory} raised {_first_line(error)} on example inputs of the shapes {shapes}",
            hint="Have the factory return example inputs that fit, or name the arrays of the samples after forward's "
            "parameters.",
        ) from error
    for leaf in _flat(answer):
        if not isinstance(leaf, torch.Tensor):
            raise InputError(
                f"forward of {factory} returned {type(leaf).__name__} among its answers, not tensors alone",
                hint="Wrap the module in one whose forward returns the tensors that are served.",
            )
    return answer


def flat_answer(module: "torch.nn.Module", examples: Mapping[str, "torch.Tensor"]) -> list["torch.Tensor"]:
    """The tensors that the module answers with, in the order that the exporter gives its outputs."""
    return _flat(_call(module, examples))


def _flat(answer: Any) -> list["torch.Tensor"]:
    """The tensors of an answer, in the order that the exporter gives its outputs."""
    from torch.utils import _pytree

    return [leaf for leaf in _pytree.tree_leaves(answer) if leaf is not None]


def _output_names(answer: Any) -> list[str]:
    count = len(_flat(answer))
    if isinstance(answer, Mapping):
        keys = [key for key, value in answer.items() if value is not None]
        if len(keys) == count:
            return [str(key) for key in keys]
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]


def _export(
    module: "torch.nn.Module",
    examples: Mapping[str, "torch.Tensor"],
    path: Path,
    *,
    opset: int | None,
    output_names: list[str],
    external: bool,
) -> None:
    import torch

    batch = torch.export.Dim("batch")
    by_name = takes_by_name(module, examples)
    shapes: Any = {name: {0: batch} for name in examples} if by_name else tuple({0: batch} for _ in examples)
    torch.onnx.export(
        module,
        () if by_name else tuple(examples.values()),
        str(path),
        kwargs=dict(examples) if by_name else None,
        dynamo=True,
        opset_version=opset,
        input_names=list(examples),
        output_names=output_names,
        dynamic_shapes=shapes,
        external_data=external,
        verbose=False,
    )


def _rewrite(path: Path, *, opset: int | None) -> None:
    """Tidies the model in place; external data stays where it is.

    Raises:
        StageError: the exporter gave another opset than the one asked for, which exporters do without a word.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    given = next(entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"})
    if opset not in {None, given}:
        raise StageError(
            f"opset {opset} was asked for, but the exporter can give this model in opset {given} only",
            hint="Leave 'opset' out, or ask for one that every operator of the model exists in.",
        )
    tidy(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _check_against(module: "torch.nn.Module", examples: Mapping[str, "torch.Tensor"], path: Path, factory: str) -> None:
    """Returns when the exported model answers as the module does."""
    import onnxruntime
    import torch

    with torch.no_grad():
        wanted = [tensor.numpy() for tensor in flat_answer(module, examples)]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    known = {value.name for value in session.get_inputs()}
    got = session.run(None, {name: tensor.numpy() for name, tensor in examples.items() if name in known})
    for value, expected, actual in zip(session.get_outputs(), wanted, got, strict=True):
        _check_same(factory, value.name, expected, actual)


def _check_same(source: str, output: str, expected: NDArray[Any], actual: NDArray[Any]) -> None:
    """Returns when an output of the exported model is the one that torch gives.

    Raises:
        StageError: it has another shape, or other values.
    """
    if expected.shape != actual.shape:
        raise StageError(
            f"{source}: the output {output!r} has shape {list(actual.shape)} in ONNX and "
            f"{list(expected.shape)} in torch"
        )
    if expected.dtype.kind != "f":
        return
    finite = np.isfinite(expected)
    scale = max(1.0, float(np.abs(expected[finite]).max(initial=0.0)))
    # Infinities, which masks have on purpose, and NaN are to be where they were.
    other = ~finite & ~((expected == actual) | (np.isnan(expected) & np.isnan(actual)))
    gap = np.abs(expected[finite].astype(np.float64) - actual[finite]).max(initial=0.0)
    worst = np.inf if other.any() else float(gap)
    if not worst <= _TOLERANCE * scale:
        raise StageError(f"{source}: the output {output!r} differs by {worst:.3g} between ONNX and torch")


# --- Hugging Face ----------------------------------------------------------------------------------------------


def export_huggingface(
    *,
    source: str,
    folder: str,
    task: str,
    pooling: str | None,
    normalize: bool,
    opset: int | None,
    allow_pickle: bool,
) -> Described:
    """Exports a Hugging Face folder to ``model.onnx`` with optimum, with any batch and sequence length.

    Args:
        source: the folder, with ``config.json`` and safetensors.
        folder: where the files are written.
        task: optimum's name of the task.
        pooling: what turns token states into one vector a row, named ``embedding``; None leaves the outputs.
        normalize: whether that vector is scaled to length 1.
        opset: of the ONNX model, or None for the exporter's own.
        allow_pickle: whether weights in ``.bin`` and ``.pt`` files may be read (by torch's weights-only reader).

    Raises:
        InputError: the folder, task or pooling does not fit.
        UntrustedModelError: its weights are pickles, or it needs code of its own.
        StageError: optimum cannot export it, or the exported model answers otherwise.
        MissingExtraError: optimum or transformers is not installed.
    """
    try:
        from optimum.exporters.onnx import main_export
    except ImportError as error:
        raise MissingExtraError("exporting a Hugging Face model", extra="hf") from error

    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as scratch:
        staged, made = Path(scratch) / "in", Path(scratch) / "out"
        for file in kept_files(Path(source), allow_pickle=allow_pickle):
            staged.mkdir(exist_ok=True)
            (staged / file.name).symlink_to(file.resolve())
            if file.suffix in _PICKLED_WEIGHTS and file.name.startswith("pytorch_model"):
                _check_weights_only(file)
        try:
            main_export(
                str(staged), output=made, task=task, opset=opset, library_name="transformers", framework="pt",
                local_files_only=True, trust_remote_code=False, do_validation=False,
            )  # fmt: skip
        except Exception as error:  # optimum, transformers and torch each have their own
            traceback.print_exc()
            raise StageError(f"optimum cannot export {source} for {task}: {_first_line(error)}") from error
        _collect(made, Path(folder))
        path = Path(folder) / ENTRY
        _check_against_folder(staged, task, path, source)
    if pooling is not None:
        append_pooling(path, pooling, normalize=normalize)
    _rewrite(path, opset=opset)
    return describe_signature(read_signature(path))


def _check_against_folder(folder: Path, task: str, path: Path, source: str) -> None:
    """Returns when the exported model answers as transformers does to made-up inputs, of several rows and of one.

    optimum has a check of its own, which lets other values pass with a word in a log. A decoder that takes its cache
    (a task ``...-with-past``) is not compared: what it keeps has another form in each version of transformers.

    Raises:
        StageError: it answers otherwise, or has an output that transformers' model does not give.
    """
    import onnxruntime
    import torch
    from optimum.exporters.tasks import TasksManager

    kind = TasksManager.map_from_synonym(task)
    library = "transformers"
    model = TasksManager.get_model_from_task(
        kind, folder, framework="pt", library_name=library, local_files_only=True, trust_remote_code=False
    ).eval()
    made_for = TasksManager.get_exporter_config_constructor("onnx", model=model, task=kind, library_name=library)(
        model.config
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]
    for rows in (_EXAMPLES, 1):
        fed = made_for.generate_dummy_inputs(framework="pt", batch_size=rows)
        if not set(inputs) <= set(fed):
            return
        with torch.no_grad():
            answer = model(**made_for.rename_ambiguous_inputs({**fed}))
        wanted = {made_for.torch_to_onnx_output_map.get(name, name): value for name, value in answer.items()}
        if missing := sorted(set(outputs) - set(wanted)):
            raise StageError(f"{source}: the exported model gives {missing[0]!r}, which transformers' does not")
        got = session.run(outputs, {name: fed[name].numpy() for name in inputs})
        for name, actual in zip(outputs, got, strict=True):
            _check_same(source, name, wanted[name].numpy(), actual)


def kept_files(folder: Path, *, allow_pickle: bool = False) -> list[Path]:
    """The files of a Hugging Face folder that an export may read, sorted by name.

    Raises:
        InputError: there is no such folder, or it has no ``config.json`` or no weights.
        UntrustedModelError: its weights are pickles, or its configuration asks for code of its own.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    files = sorted(file for file in folder.iterdir() if file.is_file())
    pickles = [file for file in files if file.suffix in _PICKLED_WEIGHTS]
    weights = [file for file in files if file.suffix == ".safetensors"]
    if not weights and pickles and not allow_pickle:
        raise UntrustedModelError(
            f"{folder} has its weights in {pickles[0].name}, a pickle; burnish unpickles nothing",
            hint="Save it again with model.save_pretrained(folder, safe_serialization=True).",
        )
    if not weights and not pickles:
        raise InputError(f"{folder} has no weights: no .safetensors file is in it")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{config} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{config} holds no object, but {type(settings).__name__}")
    if "auto_map" in settings:
        raise UntrustedModelError(
            f"{config} asks for code of its own (auto_map); burnish runs none",
            hint="Build the model in a factory of yours, and name it as a torch source.",
        )
    _check_shards(folder)
    kept = [file for file in files if file.suffix in _KEPT_SUFFIXES]
    return kept if weights else kept + pickles


def _check_weights_only(path: Path) -> None:
    """Returns when torch's weights-only reader takes the file; transformers would try other formats and name those.

    Raises:
        UntrustedModelError: it does not.
    """
    import torch

    try:
        torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # damaged files raise whatever their bytes lead to
        traceback.print_exc()
        raise UntrustedModelError(
            f"{path} holds more than weights, or is damaged: torch's weights-only reader refuses it, and burnish "
            "unpickles nothing",
            hint="Save it again with model.save_pretrained(folder, safe_serialization=True).",
        ) from error


def _check_shards(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{index} is not an index of safetensors: {error}") from error
    for name in sorted(map(str, names)):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UntrustedModelError(f"{index} names {name!r}; weights are .safetensors files of the same folder")
        if not (folder / name).is_file():
            raise InputError(f"{index} names {name!r}, which is not there")


def _collect(made: Path, folder: Path) -> None:
    """Moves the exported model, and the external data it may have, to the folder."""
    models = sorted(made.glob("*.onnx"))
    if len(models) != 1:
        names = [model.name for model in models]
        raise InputError(f"the export has the models {names}; burnish takes those that are one graph")
    for file in _with_external(models[0]):
        shutil.move(file, folder / (ENTRY if file == models[0] else file.name))


def _with_external(path: Path) -> Iterator[Path]:
    yield path
    yield from sorted(path.parent.glob("*.onnx_data*"))
    yield from sorted(path.parent.glob("*.onnx.data*"))


_POOLING = {
    "mean": """
      floats = Cast <to = 1> (mask)
      column = Unsqueeze (floats, last)
      kept = Mul (states, column)
      total = ReduceSum <keepdims = 0> (kept, middle)
      count = ReduceSum <keepdims = 1> (floats, middle)
      some = Max (count, unit)
      pooled = Div (total, some)""",
    "cls": """
      pooled = Gather <axis = 1> (states, first)""",
    "normalize": """
      squares = Mul (pooled, pooled)
      sum = ReduceSum <keepdims = 1> (squares, middle)
      positive = Max (sum, tiny)
      length = Sqrt (positive)
      embedding = Div (pooled, length)""",
    "plain": """
      embedding = Identity (pooled)""",
}
_POOLING_OPSET = 13  # from which on ReduceSum and Unsqueeze take their axes as an input
_POOLING_SIGNATURE = """
    pooling (float[b, s, h] states, int64[b, s] mask) => (float[b, h] embedding)
    <int64 first = {0}, int64[1] middle = {1}, int64[1] last = {2}, float unit = {1.0}, float tiny = {1e-12}>"""


def append_pooling(path: Path, pooling: str, *, normalize: bool) -> None:
    """Makes ``embedding`` (batch, hidden) the model's one output, in operators that any opset from 13 on has.

    ``mean`` is the mean of the token states where the attention mask is not 0; ``cls`` the state of the first token.

    Args:
        path: ONNX file whose first output is (batch, sequence, hidden); changed in place.
        pooling: ``mean`` or ``cls``.
        normalize: whether to divide by the Euclidean length.

    Raises:
        InputError: the model has no such output, no ``attention_mask`` for a mean, or too old an opset.
    """
    import onnx
    from onnx import parser

    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    shape = [dim.dim_param or dim.dim_value or None for dim in graph.output[0].type.tensor_type.shape.dim]
    inputs = [value.name for value in graph.input]
    if pooling not in {"mean", "cls"}:
        raise InputError(f"no pooling is named {pooling!r}", hint="There are mean and cls.")
    opset = next(entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"})
    if opset < _POOLING_OPSET and (pooling == "mean" or normalize):
        raise InputError(
            f"pooling {pooling}{', normalized,' if normalize else ''} needs opset {_POOLING_OPSET}, and the model is "
            f"of opset {opset}",
            hint="Leave 'opset' out, or ask for a newer one.",
        )
    if len(shape) != 3:
        raise InputError(f"pooling wants token states (batch, sequence, hidden); the first output is {shape}")
    if pooling == "mean" and "attention_mask" not in inputs:
        raise InputError(f"mean pooling wants the input 'attention_mask'; the model has {inputs}")
    body = _POOLING[pooling] + _POOLING["normalize" if normalize else "plain"]
    tail = parser.parse_graph(f"{_POOLING_SIGNATURE} {{ {body} }}")
    outer = {"states": graph.output[0].name, "mask": "attention_mask", "embedding": "embedding"}
    for node in tail.node:
        node.input[:] = [outer.get(name, f"pooling/{name}") for name in node.input]
        node.output[:] = [outer.get(name, f"pooling/{name}") for name in node.output]
        node.name = f"pooling/{node.op_type}/{node.output[0].removeprefix('pooling/')}"
    used = {name for node in tail.node for name in node.input}
    for tensor in tail.initializer:
        tensor.name = f"pooling/{tensor.name}"
    graph.node.extend(tail.node)
    graph.initializer.extend(tensor for tensor in tail.initializer if tensor.name in used)
    del graph.output[:]
    graph.output.append(onnx.helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, [shape[0], shape[2]]))
    path.write_bytes(model.SerializeToString(deterministic=True))
