"""What the door lets in, and what it does not."""

import os
import zipfile

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from optimize.admission import MOST_NODES, admit, admit_openvino, external_files, refuse_other_formats
from registry.errors import InputError, UntrustedModelError

MODEL = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> g (float[batch,4] x) => (float[batch,4] y) {%s}'


def build(body="y = Mul(x, w)", weight=None):
    model = parser.parse_model(MODEL % body)
    weight = numpy_helper.from_array(np.ones(4, np.float32), "w") if weight is None else weight
    model.graph.initializer.append(weight)
    return model


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    return tmp_path / "from", tmp_path / "to"


def let_in(folders, model, name="net.onnx"):
    origin, target = folders
    (origin / name).write_bytes(model.SerializeToString())
    return admit(origin / name, target)


def external(location, *, offset="0", length="16", dims=(4,)):
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            weight.external_data.add(key=key, value=value)
    return build(weight=weight)


def test_a_model_is_copied_under_one_name(folders):
    inputs, outputs = let_in(folders, build())
    assert [spec.name for spec in (*inputs, *outputs)] == ["x", "y"]
    assert [file.name for file in folders[1].iterdir()] == ["model.onnx"]


def test_external_data_comes_along(folders):
    (folders[0] / "deep").mkdir()
    (folders[0] / "deep" / "w.data").write_bytes(bytes(16))
    (folders[0] / "other.txt").write_text("stays")
    let_in(folders, external("deep/w.data"))
    assert (folders[1] / "deep" / "w.data").read_bytes() == bytes(16)
    assert not (folders[1] / "other.txt").exists()
    assert external_files(folders[0] / "net.onnx") == ["deep/w.data"]


@pytest.mark.parametrize(
    "location",
    ["../w.data", "a/../../w.data", "/etc/passwd", "C:\\w.data", "..\\w.data", "model.onnx", ".", ""],
)
def test_external_data_stays_inside_of_the_folder(folders, location):
    (folders[0].parent / "w.data").write_bytes(bytes(16))
    with pytest.raises(UntrustedModelError, match=r"outside|inside"):
        let_in(folders, external(location))


def test_a_link_that_leads_out_is_refused(folders):
    (folders[0].parent / "secret").write_bytes(bytes(16))
    (folders[0] / "w.data").symlink_to(folders[0].parent / "secret")
    with pytest.raises(UntrustedModelError, match="a link to"):
        let_in(folders, external("w.data"))


def test_a_pipe_is_refused(folders):
    os.mkfifo(folders[0] / "w.data")
    with pytest.raises(UntrustedModelError, match="no regular file"):
        let_in(folders, external("w.data"))


@pytest.mark.parametrize("location", ["missing.data", "*/_ORT_MEM_ADDR_/*"])
def test_external_data_that_is_not_there(folders, location):
    with pytest.raises(InputError, match="not beside it"):
        let_in(folders, external(location))


@pytest.mark.parametrize(
    ("offset", "length", "text"),
    [("8", "16", "holds 8"), ("0", "12", "holds 12"), ("99", None, "holds 0"), ("-4", "16", "negative"),
     ("x", "16", "no number")],
)  # fmt: skip
def test_external_data_shorter_than_declared(folders, offset, length, text):
    (folders[0] / "w.data").write_bytes(bytes(16))
    with pytest.raises(UntrustedModelError, match=text):
        let_in(folders, external("w.data", offset=offset, length=length))


def test_ten_gigabytes_declared_in_a_small_file(folders):
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=(2_500_000_000,), raw_data=bytes(16))
    with pytest.raises(UntrustedModelError, match=r"^net\.onnx: .* declares 10,000,000,000 bytes and holds 16"):
        let_in(folders, build(weight=weight))


def test_products_that_would_overflow_are_seen(folders):
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=(2**32, 2**32), raw_data=bytes(16))
    with pytest.raises(UntrustedModelError, match="declares"):
        let_in(folders, build(weight=weight))


def test_tensors_inside_of_attributes_and_subgraphs_count(folders):
    model = build("y = Mul(x, w)")
    inner = helper.make_graph([helper.make_node("Constant", [], ["v"], value=lying())], "inner", [], [])
    inner.output.append(helper.make_tensor_value_info("v", TensorProto.FLOAT, None))
    model.graph.node.append(helper.make_node("If", ["c"], ["v2"], then_branch=inner, else_branch=inner))
    with pytest.raises(UntrustedModelError, match="'inner_weight'"):
        let_in(folders, model)


def lying():
    return TensorProto(name="inner_weight", data_type=TensorProto.DOUBLE, dims=(10**6,), raw_data=b"")


def test_a_sparse_tensor_that_unfolds_to_gigabytes(folders):
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "sparse_indices")
    model = build()
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [10**10]))
    with pytest.raises(UntrustedModelError, match="unfold to 40,000,000,000 bytes"):
        let_in(folders, model)


@pytest.mark.parametrize(
    "array",
    [np.ones((2, 2), dtype) for dtype in ("float16", "float64", "int8", "int64", "uint8", "uint64", "bool")]
    + [np.ones(3, "complex64"), np.ones(0, "float32"), np.float32(1)],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
@pytest.mark.parametrize("raw", [True, False])
def test_honest_tensors_of_every_type_pass(folders, array, raw):
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    values = array.tobytes() if raw else array.reshape(-1).tolist()
    model = build()
    model.graph.initializer.append(helper.make_tensor("extra", kind, array.shape, values, raw=raw))
    assert let_in(folders, model)


def test_packed_int4_and_strings_pass(folders):
    model = build()
    model.ir_version = 10
    model.opset_import[0].version = 21
    model.graph.initializer.append(helper.make_tensor("nibbles", TensorProto.INT4, [3], [1, 2, 3]))
    model.graph.initializer.append(helper.make_tensor("words", TensorProto.STRING, [2], [b"a", b""]))
    assert let_in(folders, model)


def test_unknown_domains_are_refused_and_only_where_they_are_called(folders):
    model = build()
    model.opset_import.append(helper.make_opsetid("com.evil", 1))
    assert let_in(folders, model)
    model.graph.node[0].domain = "com.evil"
    with pytest.raises(UntrustedModelError, match=r"unknown domain 'com\.evil'"):
        let_in(folders, model)


def test_functions_inside_of_the_model_are_known(folders):
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "mine" : 1]> g (float[b] x) => (float[b] y) { y = mine.twice(x) }'
        ' <domain: "mine", opset_import: ["" : 17]> twice (a) => (b) { b = Add(a, a) }'
    )
    assert let_in(folders, model)


def test_operators_that_hide_what_they_run_are_refused(folders):
    with pytest.raises(UntrustedModelError, match="EPContext"):
        let_in(folders, build("y = com.microsoft.EPContext(x)"))


def test_sparse_tensors_count_together(folders):
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "sparse_indices")
    model = build()
    for _ in range(3):
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [25_000_000]))
    with pytest.raises(UntrustedModelError, match="unfold to 300,000,000 bytes"):
        let_in(folders, model)


def test_more_nodes_than_any_model_has(folders):
    graph = b"\x0a\x00" * (MOST_NODES + 1)  # field 1, a node, of no bytes
    length = len(graph)
    varint = bytes([length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14])
    (folders[0] / "net.onnx").write_bytes(b"\x08\x08\x3a" + varint + graph)
    with pytest.raises(UntrustedModelError, match="more nodes"):
        admit(folders[0] / "net.onnx", folders[1])


def test_nodes_are_counted_before_the_file_is_parsed(folders, monkeypatch):
    monkeypatch.setattr("optimize.admission.MOST_NODES", 2)
    monkeypatch.setattr(onnx, "load", lambda *_, **__: pytest.fail("it was parsed"))
    branches = "then_branch = t () => (float u) { u = Neg (x) }, else_branch = e () => (float v) { v = Abs (x) }"
    with pytest.raises(UntrustedModelError, match="more nodes"):
        let_in(folders, build(f"c = Cast <to = 9> (x) z = If (c) <{branches}> y = Mul (x, w)"))


def test_more_parts_of_nodes_than_any_model_has(folders, monkeypatch):
    monkeypatch.setattr("optimize.admission.MOST_FIELDS", 3)
    with pytest.raises(UntrustedModelError, match="parts of nodes"):
        let_in(folders, build())


def doubling(levels):
    functions = "".join(
        f'<domain: "f", opset_import: ["" : 17, "f" : 1]> f{i} (a) => (r) {{ m = f.f{i - 1} (a) r = f.f{i - 1} (m) }}'
        for i in range(1, levels + 1)
    )
    return parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17, "f" : 1]> g (float[b] x) => (float[b] y) {{ y = f.f{levels} (x) }}'
        f'{functions}<domain: "f", opset_import: ["" : 17]> f0 (a) => (r) {{ r = Relu (a) }}'
    )


def test_functions_that_double_with_each_level(folders):
    assert let_in(folders, doubling(4))
    with pytest.raises(UntrustedModelError, match="1,099,511,627,776 nodes when its functions are written out"):
        let_in(folders, doubling(40))


def test_functions_that_call_themselves(folders):
    with pytest.raises(InputError, match="must not be recursive"):
        let_in(folders, parser.parse_model(
            '<ir_version: 8, opset_import: ["" : 17, "f" : 1]> g (float[b] x) => (float[b] y) { y = f.f (x) }'
            '<domain: "f", opset_import: ["" : 17, "f" : 1]> f (a) => (r) { m = f.f (a) r = Relu (m) }'
        ))  # fmt: skip


def test_graphs_nested_deeper_than_protobuf_reads(folders):
    def field(number, content):
        length, size = len(content), b""
        while length > 0x7F:
            size, length = size + bytes([length & 0x7F | 0x80]), length >> 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + content

    graph = b""
    for _ in range(60):
        graph = field(1, field(5, field(6, graph)))  # a node, its attribute, the graph in it
    (folders[0] / "net.onnx").write_bytes(b"\x08\x08" + field(7, graph))
    with pytest.raises(InputError, match="not an ONNX model"):
        admit(folders[0] / "net.onnx", folders[1])


def test_many_tensors_that_are_the_same_bytes(folders):
    (folders[0] / "w.data").write_bytes(bytes(40_000_000))
    model = external("w.data", length="40000000", dims=(10_000_000,))
    for i in range(20):
        model.graph.initializer.append(model.graph.initializer[0])
        model.graph.initializer[-1].name = f"w{i}"
    with pytest.raises(UntrustedModelError, match="declare 840,000,000 bytes, and their files hold 40,000,000"):
        let_in(folders, model)


def test_data_larger_than_the_disk_is_not_copied(folders):
    with (folders[0] / "w.data").open("wb") as file:
        file.truncate(2**43)  # a hole: it takes no room where it is
    with pytest.raises(InputError, match="and the disk of"):
        let_in(folders, external("w.data"))


def test_weights_of_openvino_stay_inside_of_the_folder(folders):
    (folders[0] / "net.xml").write_text("<net/>")
    (folders[0].parent / "secret").write_bytes(b"secret")
    (folders[0] / "net.bin").symlink_to(folders[0].parent / "secret")
    with pytest.raises(UntrustedModelError, match="a link to"):
        admit_openvino(folders[0] / "net.xml", folders[1])
    assert not list(folders[1].iterdir())


@pytest.mark.parametrize("opset", [0, 99, -1])
def test_opsets_that_there_are_not(folders, opset):
    model = build()
    model.opset_import[0].version = opset
    with pytest.raises(InputError, match=f"opset {opset}; burnish knows opsets 1 to"):
        let_in(folders, model)


@pytest.mark.parametrize(
    ("name", "content", "kind", "text"),
    [
        ("model.pt", b"PK\x03\x04....", UntrustedModelError, "pickle"),
        ("model.onnx", b"PK\x03\x04....", UntrustedModelError, "zip archive"),
        ("model.onnx", b"\x80\x04\x95\x00\x00", UntrustedModelError, "pickle; burnish unpickles nothing"),
        ("weights.bin", b"anything", UntrustedModelError, "pickle"),
        ("model.h5", b"\x89HDF\r\n", UntrustedModelError, "HDF5"),
        ("model.safetensors", b"\x10\0\0\0", InputError, "weights only"),
        ("model.onnx", b"", InputError, "empty"),
    ],
)
def test_other_formats_are_named(tmp_path, name, content, kind, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(kind, match=text):
        refuse_other_formats(tmp_path / name)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="no model at"):
        refuse_other_formats(tmp_path / "none.onnx")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="is a folder") as caught:
        refuse_other_formats(tmp_path)
    assert "huggingface" in caught.value.hint


@pytest.mark.parametrize("content", [b"not a model at all", b"\x00" * 64, b'{"a": 1}', b"\x08\x08"])
def test_what_is_not_onnx(folders, content):
    (folders[0] / "net.onnx").write_bytes(content)
    with pytest.raises(InputError, match="not an ONNX model"):
        admit(folders[0] / "net.onnx", folders[1])


def test_a_truncated_model(folders):
    whole = build().SerializeToString()
    for end in range(1, len(whole), 7):
        (folders[0] / "net.onnx").write_bytes(whole[:end])
        with pytest.raises(InputError):
            admit(folders[0] / "net.onnx", folders[1])


def test_flipped_bits_are_refused_or_harmless_but_never_a_crash(folders):
    whole = bytearray(build().SerializeToString())
    generator = np.random.default_rng(0)
    for place in generator.integers(0, len(whole) * 8, 150):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << (place % 8)
        (folders[0] / "net.onnx").write_bytes(damaged)
        try:
            admit(folders[0] / "net.onnx", folders[1])
        except InputError:
            continue


def test_an_invalid_graph(folders):
    with pytest.raises(InputError, match="not a valid ONNX model"):
        let_in(folders, build("y = Mul(x, nowhere)"))


def test_a_zip_of_a_torch_checkpoint_is_never_opened(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.onnx", "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(UntrustedModelError, match="unpickles nothing"):
        refuse_other_formats(tmp_path / "model.onnx")


def test_old_models_with_weights_among_the_inputs(folders):
    model = build()
    model.ir_version = 3
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4]))
    inputs, _ = let_in(folders, model)
    assert [spec.name for spec in inputs] == ["x"]


def test_large_models_are_told_to_use_external_data(tmp_path):
    with (tmp_path / "net.onnx").open("wb") as file:
        file.write(b"\x08\x08")
        file.truncate(2**31)
    with pytest.raises(InputError, match="2 GiB"):
        refuse_other_formats(tmp_path / "net.onnx")


def test_saved_by_onnx_with_external_data(folders):
    model = build(weight=numpy_helper.from_array(np.ones(4, np.float32), "w"))
    onnx.save(model, folders[0] / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    admit(folders[0] / "net.onnx", folders[1])
    kept = onnx.load(folders[1] / "model.onnx")
    assert numpy_helper.to_array(kept.graph.initializer[0]).tolist() == [1, 1, 1, 1]
