import onnx
import pytest
from onnx import TensorProto, helper, parser

from optimize.signature import read_signature
from registry.errors import InputError
from registry.records import TensorSpec


def save(path, signature, body):
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {signature} {{ {body} }}')
    onnx.save(model, path)
    return path


def test_types_and_dimensions_as_the_graph_has_them(tmp_path):
    path = save(tmp_path / "m.onnx", "(float16[batch,3,?] a, int64[2] b, string[n] c) => (double[batch] y)",
                "y = Identity(a)")  # fmt: skip
    inputs, outputs = read_signature(path)
    assert inputs == (
        TensorSpec(name="a", dtype="float16", shape=("batch", 3, None)),
        TensorSpec(name="b", dtype="int64", shape=(2,)),
        TensorSpec(name="c", dtype="str", shape=("n",)),
    )
    assert outputs == (TensorSpec(name="y", dtype="float64", shape=("batch",)),)


def test_weights_among_the_inputs_are_left_out(tmp_path):
    path = save(tmp_path / "m.onnx", "(float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}>", "y = Add(x, w)")
    assert [spec.name for spec in read_signature(path)[0]] == ["x"]


def test_external_data_is_not_read(tmp_path):
    path = save(tmp_path / "m.onnx", "(float[2] x) => (float[2] y)", "y = Add(x, w)")
    model = onnx.load(path)
    weight = model.graph.initializer.add(name="w", data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="nowhere.data")
    path.write_bytes(model.SerializeToString())
    assert len(read_signature(path)[0]) == 1


@pytest.mark.parametrize("content", [b"", b"hello, I am no model", b"\x08\x08"])
def test_what_is_not_onnx(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(InputError, match="not an ONNX model"):
        read_signature(tmp_path / "m.onnx")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = save(tmp_path / "m.onnx", "(float[2] x) => (float[2] y) <float[2] w = {1, 2}>", "y = Add(x, w)")
    whole = path.read_bytes()
    end_of_graph = onnx.load(path).graph.ByteSize() + whole.index(b"\x3a")
    for length in range(end_of_graph):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"m\.onnx is not an ONNX model"):
            read_signature(path)


def test_sequences_and_unknown_types_are_refused(tmp_path):
    graph = helper.make_graph([], "g", [], [helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    with pytest.raises(InputError, match="'y' is not a tensor"):
        read_signature(tmp_path / "m.onnx")
    graph.output[0].type.tensor_type.elem_type = 65
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    with pytest.raises(InputError, match="unknown tensor type 65"):
        read_signature(tmp_path / "m.onnx")


def test_openvino(tmp_path):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    path = save(tmp_path / "m.onnx", "(float[batch,3] x) => (float[batch,3] y)", "y = Relu(x)")
    openvino.save_model(openvino.convert_model(path), tmp_path / "m.xml", compress_to_fp16=False)
    inputs, outputs = read_signature(tmp_path / "m.xml")
    assert inputs == (TensorSpec(name="x", dtype="float32", shape=(None, 3)),)
    assert outputs[0].name == "y"
    (tmp_path / "m.xml").write_text("<net/>")
    with pytest.raises(InputError, match="not an OpenVINO model"):
        read_signature(tmp_path / "m.xml")
