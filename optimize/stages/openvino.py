"""Stages for OpenVINO: ONNX to its intermediate representation (IR), and that to int8 through nncf."""

import difflib
import logging
import re
from collections.abc import Collection, Container
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from optimize.calibration import whole_batches
from optimize.protobuf_wire import contents, mapped
from optimize.stages.base import Context, Stage, StageInput, StageParams, StageResult
from profiles.serving.session import import_engine
from registry.errors import InputError, MissingExtraError, NotApplicableError

ENTRY = "model.xml"
WITHOUT_BIASES = "/WithoutBiases"
"""What OpenVINO adds to the name of an ONNX node whose bias becomes a node of its own."""
_GRAPH, _NODE, _NODE_OUTPUT, _NODE_NAME = 7, 1, 2, 3  # fields of ModelProto, GraphProto and NodeProto in onnx.proto
# OpenVINO 2026.4 answers wrongly (a cosine of .51 for the last state of an LSTM) where what goes into these is
# quantized with an offset, and rightly where ranges are centred on zero.
_RECURRENT = frozenset(f"{cell}{form}" for cell in ("LSTM", "GRU", "RNN") for form in ("Sequence", "Cell"))
_COUNTED = re.compile(r"[A-Z][A-Za-z0-9]*_\d+(/.*)?")


class ToOpenVino(Stage):
    """The model as OpenVINO IR, weights in float32 as they were.

    Names and types of inputs and outputs stay, and so do their ranks; symbolic dimensions lose their names. Source:
    openvino.convert_model.
    """

    name = "convert.openvino"
    tools = ("openvino",)

    def requires(self, source: StageInput, context: Context) -> None:
        """Looks whether OpenVINO is installed."""
        _import("openvino", self.name)

    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Converts; an operator that OpenVINO does not know makes the model one it cannot take."""
        openvino = _import("openvino", self.name)
        known = _onnx_names(source.path)  # before the conversion, so that the two never share memory
        try:
            model = openvino.convert_model(str(source.path))
        except Exception as error:  # its frontends raise classes of their own that share no base but this
            raise NotApplicableError(f"OpenVINO cannot convert the model: {_reason(error)}") from error
        sides = (len(model.inputs), len(model.outputs)), (len(source.inputs), len(source.outputs))
        if sides[0] != sides[1]:
            raise NotApplicableError(
                f"{self.name}: OpenVINO gives the model {sides[0][0]} inputs and {sides[0][1]} outputs, where it has "
                f"{sides[1][0]} and {sides[1][1]}",
                hint="An input that is an output, too, goes through an Identity first.",
            )
        for port, spec in zip((*model.inputs, *model.outputs), (*source.inputs, *source.outputs), strict=True):
            # A tensor may carry several names; the one that requests use must be the only one.
            if port.get_names() != {spec.name}:
                port.get_tensor().set_names({spec.name})
        _save(openvino, model, context, known=known)
        return self.written(context, ENTRY)


class OpenVinoInt8Params(StageParams):
    """Parameters of ``quantize.openvino``.

    Attributes:
        preset: ``mixed`` quantizes weights around zero and activations with an offset; ``performance`` both around
            zero, as is done with a model that has an LSTM, GRU or RNN in any case.
        model_type: ``transformer`` treats attention as nncf knows it; ``auto`` does so where the graph attends.
        subset_size: most batches of samples that are used.
        batch_size: samples fed at once, where the model does not fix the batch; nncf's statistics are meant for 1.
        fast_bias_correction: whether biases are corrected by the faster of nncf's two ways.
        float_nodes: names of nodes that stay in float32, as the ONNX model had them; a node that had none, or that
            gives an output of the model, goes by its output's name. ``conv`` stands for ``conv/WithoutBiases``, too.
    """

    preset: Literal["mixed", "performance"] = "mixed"
    model_type: Literal["auto", "transformer", "none"] = "auto"
    subset_size: int = Field(default=300, ge=1)
    batch_size: int = Field(default=1, ge=1)
    fast_bias_correction: bool = True
    float_nodes: tuple[str, ...] = ()


class OpenVinoInt8(Stage):
    """Int8 weights and activations as FakeQuantize nodes that OpenVINO fuses, calibrated on samples.

    Names, types and ranks of inputs and outputs stay. nncf chooses its own number of threads. Source: nncf.quantize.
    """

    name = "quantize.openvino"
    version = 2
    Params = OpenVinoInt8Params
    formats = ("openvino",)
    needs_calibration = True
    tools = ("nncf", "openvino", "numpy")
    params: OpenVinoInt8Params

    def requires(self, source: StageInput, context: Context) -> None:
        """Looks whether nncf is installed."""
        _import("openvino", self.name)
        _import("nncf", self.name)

    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Quantizes; a model without a node that nncf quantizes is refused."""
        assert context.calibration is not None  # the contract has looked
        openvino, nncf = _import("openvino", self.name), _import("nncf", self.name)
        nncf.set_log_level(logging.ERROR)
        model = openvino.Core().read_model(str(source.path))
        if any(op.get_type_name() == "FakeQuantize" for op in model.get_ops()):
            raise NotApplicableError(f"{self.name} takes a float32 model, and this one is quantized already")
        if any(port.get_element_type() == openvino.Type.f64 for op in model.get_ops() for port in op.outputs()):
            raise NotApplicableError(f"{self.name} takes a float32 model, and this one computes in float64")
        known = {op.get_friendly_name() for op in model.get_ops()}
        left_out = self._left_out(known)
        batches = whole_batches(context.calibration, source.inputs, wanted=self.params.batch_size)
        transformer = self.params.model_type == "transformer" or (self.params.model_type == "auto" and _attends(model))
        recurrent = any(op.get_type_name() in _RECURRENT for op in model.get_ops())
        try:
            made = nncf.quantize(
                model,
                nncf.Dataset(batches),
                preset=nncf.QuantizationPreset("performance" if recurrent else self.params.preset),
                subset_size=min(self.params.subset_size, len(batches)),
                fast_bias_correction=self.params.fast_bias_correction,
                model_type=nncf.ModelType.TRANSFORMER if transformer else None,
                ignored_scope=nncf.IgnoredScope(names=left_out, validate=False) if left_out else None,
            )
        except nncf.ValidationError as error:
            if "dataset must not be empty" not in str(error):
                raise
            raise NotApplicableError(
                f"{self.name}: nncf calibrates each branch of an If on the samples that take it, and none takes one "
                "of them",
                hint="Give calibration samples that take both branches.",
            ) from error
        done = sum(op.get_type_name() == "FakeQuantize" for op in made.get_ops())
        if not done:
            raise NotApplicableError(f"{self.name}: nncf found nothing to quantize in this model")
        _save(openvino, made, context, known=known)
        kind = "as a transformer" if transformer else "with nncf's defaults"
        return self.written(context, ENTRY, f"{done} FakeQuantize nodes, {kind}")

    def _left_out(self, known: Collection[str]) -> list[str]:
        """Names in the IR of the nodes that stay in float32."""
        found: list[str] = []
        for name in self.params.float_nodes:
            hits = [one for one in (name, f"{name}{WITHOUT_BIASES}") if one in known]
            if not hits:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
                raise InputError(
                    f"{self.name}: float_nodes names {name!r}, and the model has no such node",
                    hint=f"Did you mean {nearest[0].removesuffix(WITHOUT_BIASES)!r}?" if nearest else None,
                )
            found += hits
        return found


def _import(package: str, stage: str) -> Any:
    try:
        return import_engine(package)
    except ImportError as error:
        missing = MissingExtraError(stage, extra="openvino")
        raise NotApplicableError(missing.message, hint=missing.hint) from error


def _save(openvino: Any, model: Any, context: Context, *, known: Container[str]) -> None:
    """Writes the IR, with the same bytes each time.

    OpenVINO calls nodes that have no name after a counter of the process (``Multiply_2472``), and names of that kind
    travel to the nodes that replace them. All but the ``known`` ones are replaced by the node's place.
    """
    for position, op in enumerate(model.get_ordered_ops()):
        name = op.get_friendly_name()
        if _COUNTED.fullmatch(name) and name.split("/")[0] not in known:
            op.set_friendly_name(f"{op.get_type_name()}.{position}")
    openvino.save_model(model, str(context.out / ENTRY), compress_to_fp16=False)


def _onnx_names(path: Path) -> set[str]:
    """Names of the graph's nodes and of what they put out."""
    with mapped(path) as data:
        return {
            str(data[begin:end], "utf-8")
            for graph in contents(data, (0, len(data)), _GRAPH)
            for node in contents(data, graph, _NODE)
            for begin, end in contents(data, node, _NODE_OUTPUT, _NODE_NAME)
        }


def _attends(model: Any) -> bool:
    for op in model.get_ops():
        if op.get_type_name() == "ScaledDotProductAttention":
            return True
        if op.get_type_name() == "Softmax":
            takers = (target.get_node() for target in op.output(0).get_target_inputs())
            if any(taker.get_type_name() == "MatMul" for taker in takers):
                return True
    return False


def _reason(error: Exception) -> str:
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -")]
    told = [line for line in lines if "No conversion rule" in line]
    told += [line for line in lines if not line.startswith(("Exception from", "Check '", "FrontEnd API", "Summary"))]
    return (told or lines or ["no message"])[0][:300]
