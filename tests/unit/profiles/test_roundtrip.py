import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from optimize.cli import main
from profiles.deploy import storage_uris
from profiles.serving.mlserver import IMPLEMENTATION, render_mlserver
from profiles.serving.model_config_2022 import ConfigError, parse
from profiles.serving.roundtrip import Finding, agent_rewrite, check_roundtrip, check_uri, guess_server
from profiles.serving.triton import (
    GpuServing,
    TensorRtProvider,
    render_triton,
    render_triton_plan,
    render_triton_tensorrt,
)
from registry.errors import InputError
from registry.records import Artifact, EngineSpec, TensorSpec
from tests.doubles.candidates import candidate

OPENVINO = EngineSpec(name="openvino")
ARTIFACT = Artifact(
    digest="0" * 64,
    format="onnx",
    entry="model.onnx",
    files=(),
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 8)),),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 4)),),
)
OURS = {"implementation": IMPLEMENTATION, "parameters": {"uri": "./model.onnx"}}
BATCHED: dict[str, Any] = {"max_batch_size": 8, "max_batch_delay_ms": 2.0}


def folder(at: Path, files: Mapping[str, str | dict[str, Any]]) -> Path:
    """A folder of these files; an object is written as JSON."""
    for path, content in files.items():
        (at / path).parent.mkdir(parents=True, exist_ok=True)
        (at / path).write_text(content if isinstance(content, str) else json.dumps(content))
    return at


def settings(at: Path, **changed: Any) -> Path:
    """A folder for our runtime with these keys in its model-settings.json; a key of None is left out."""
    content = {key: value for key, value in {**OURS, **changed}.items() if value is not None}
    return folder(at, {"model-settings.json": content, "model.onnx": ""})


def config(at: Path, text: str) -> Path:
    """A folder for Triton with this configuration."""
    return folder(at, {"config.pbtxt": f'name: "x" backend: "onnxruntime" {text}', "1/model.onnx": ""})


def served(at: Path, server: str = "mlserver", **model: Any) -> dict[str, Any]:
    """What MLServer reads after the agent."""
    rewritten = agent_rewrite(at, server, name="m", **model)
    assert not rewritten.refused, rewritten.findings
    return json.loads(rewritten.files["m_1/1/model-settings.json"])


def only(findings: tuple[Finding, ...], *, rule: str) -> Finding:
    """The one finding of a rule."""
    (found,) = (found for found in findings if found.rule == rule)
    return found


def serious(findings: tuple[Finding, ...]) -> list[Finding]:
    """The findings that matter."""
    return [found for found in findings if found.severity != "info"]


# --- our own renderings come through -----------------------------------------------------------------------------


@pytest.mark.parametrize("batching", [{}, BATCHED], ids=["single", "batched"])
@pytest.mark.parametrize("engine", [EngineSpec(name="onnxruntime"), OPENVINO], ids=lambda engine: engine.name)
@pytest.mark.parametrize("workers", [0, 2])
def test_our_mlserver_rendering_loses_nothing(tmp_path, batching, engine, workers):
    wanted = candidate(engine=engine, parallel_workers=workers, **batching)
    files = render_mlserver(wanted, ARTIFACT, model_name="m", http_port=1, grpc_port=2, metrics_port=3)
    folder(tmp_path, {**files, "m/model.onnx": ""})
    assert serious(check_roundtrip(tmp_path / "m", "mlserver", name="m")) == []
    before = json.loads(files["m/model-settings.json"])
    after = served(tmp_path / "m")
    assert after == {**before, "name": "m_1", "parameters": {**before["parameters"], "version": "1"}}


GPU = GpuServing(max_batch_size=8, max_batch_delay_ms=1.0, instances=2)
PROFILE = {f"trt_profile_{end}_shapes": f"x:{rows}x8" for end, rows in (("min", 1), ("opt", 8), ("max", 8))}


@pytest.mark.parametrize(
    "files",
    [
        render_triton(candidate(server="triton", **options), ARTIFACT, model_name="m")
        for options in (
            {},
            BATCHED,
            {"backend": "onnxruntime", **BATCHED},
            {"backend": "onnxruntime", "engine": EngineSpec(name="onnxruntime", graph_level="basic"), "threads": 2},
            {"backend": "openvino", "engine": OPENVINO, **BATCHED},
            {"backend": "openvino", "engine": OPENVINO},
            {"instances": 2},
        )
    ]
    + [
        render_triton_plan(ARTIFACT, model_name="m", serving=GPU),
        render_triton_plan(ARTIFACT, model_name="m"),
        render_triton_tensorrt(
            ARTIFACT, model_name="m", provider=TensorRtProvider(profile_shapes=PROFILE), serving=GPU
        ),
    ],
    ids=["python", "python-batched", "ort-batched", "ort", "ov-batched", "ov", "instances", "plan", "plan-1", "trt"],
)
def test_our_triton_rendering_loses_nothing(tmp_path, files):
    folder(tmp_path, {**files, "m/1/model.onnx": "", "m/1/model.plan": ""})
    rewritten = agent_rewrite(tmp_path / "m", "triton", name="m")
    assert serious(rewritten.findings) == []
    before = text_format.Parse(files["m/config.pbtxt"], model_config_pb2.ModelConfig())
    after = text_format.Parse(rewritten.files["m_1/config.pbtxt"].decode(), model_config_pb2.ModelConfig())
    assert after.name == "m_1"
    before.name = "m_1"
    assert after == before
    assert "m_1/1/model.onnx" in rewritten.copies


# --- model-settings.json: key by key -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "key", "severity", "way"),
    [
        ({"max_batch_size": 8, "max_batch_time": 0.1}, "/max_batch_size", "error", "MLSERVER_MODEL_MAX_BATCH_SIZE"),
        ({"max_batch_size": 8, "max_batch_time": 0.1}, "/max_batch_time", "error", "MLSERVER_MODEL_MAX_BATCH_TIME"),
        ({"max_batch_size": 8}, "/max_batch_size", "info", ""),
        ({"max_batch_size": 0}, "/max_batch_size", "info", ""),
        ({"max_batch_time": 0.5}, "/max_batch_time", "info", ""),
        ({"warm_workers": True}, "/warm_workers", "info", ""),
        ({"cache_enabled": True}, "/cache_enabled", "error", "MLSERVER_CACHE_ENABLED"),
        ({"cache_enabled": False}, "/cache_enabled", "info", ""),
        ({"parameters": {"environment_path": "env"}}, "/parameters/environment_path", "error", "environment_tarball"),
        ({"parameters": {"inference_pool_gid": "a"}}, "/parameters/inference_pool_gid", "error", "AUTOGENERATE"),
        (
            {"parameters": {"autogenerate_inference_pool_gid": True}},
            "/parameters/autogenerate_inference_pool_gid",
            "error",
            "MLSERVER_MODEL_AUTOGENERATE_INFERENCE_POOL_GID",
        ),
        (
            {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "parameters": {"content_type": "np"}}]},
            "/inputs/0/parameters",
            "error",
            "parameters.content_type",
        ),
        (
            {"outputs": [{"name": "y", "datatype": "FP32", "shape": [1], "parameters": {"content_type": "np"}}]},
            "/outputs/0/parameters",
            "error",
            "MLSERVER_MODEL_INPUTS",
        ),
    ],
)
def test_a_lost_key_is_found_with_the_way_to_keep_it(tmp_path, changed, key, severity, way):
    findings = check_roundtrip(settings(tmp_path, **changed), "mlserver")
    (found,) = (found for found in findings if found.key == key)
    assert (found.rule, found.severity) == ("C101", severity)
    assert way in found.way
    assert not way or found.message.startswith("lost")
    after = served(tmp_path)
    for part in key.split("/")[1:-1]:
        after = after[int(part)] if isinstance(after, list) else after[part]
    assert key.rpartition("/")[2] not in after


@pytest.mark.parametrize(
    ("changed", "key", "severity"),
    [
        ({"custom": 1}, "/custom", "warning"),
        ({"a/b~c": 1}, "/a~1b~0c", "warning"),
        ({"parameters": {"custom": 1}}, "/parameters/custom", "error"),
        ({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "tags": []}]}, "/inputs/0/tags", "warning"),
    ],
)
def test_a_key_of_ones_own_belongs_into_extra(tmp_path, changed, key, severity):
    found = only(check_roundtrip(settings(tmp_path, **changed), "mlserver"), rule="C106")
    assert (found.key, found.severity) == (key, severity)
    assert "parameters.extra" in found.way


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"name": "old"}, "/name"),
        ({"versions": ["v1"]}, "/versions"),
        ({"parameters": {"version": "7"}}, "/parameters/version"),
    ],
)
def test_names_and_versions_are_core_2s_own(tmp_path, changed, key):
    found = only(check_roundtrip(settings(tmp_path, **changed), "mlserver"), rule="C102")
    assert (found.key, found.severity) == (key, "info")
    after = served(tmp_path, version=1)
    assert (after["name"], after["parameters"]["version"]) == ("m_1", "1")


@pytest.mark.parametrize(
    ("changed", "rule", "key", "said"),
    [
        ({"parallel_workers": "2"}, "C103", "/parallel_workers", 'a text ("2"), not an integer'),
        ({"parallel_workers": True}, "C103", "/parallel_workers", "true or false"),
        ({"parallel_workers": 1.5}, "C103", "/parallel_workers", "not an integer"),
        ({"versions": [1]}, "C103", "/versions", "a list of texts"),
        ({"parameters": []}, "C103", "/parameters", "not an object"),
        ({"parameters": {"extra": "a"}}, "C103", "/parameters/extra", "not an object"),
        ({"parameters": {"uri": 1}}, "C103", "/parameters/uri", "not a text"),
        ({"inputs": {}}, "C103", "/inputs", "not a list of objects"),
        ({"inputs": [{"shape": [1.5]}]}, "C103", "/inputs/0/shape", "not a list of integers"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": []}]}, "C105", "/inputs/0/shape", "empty shape"),
    ],
)
def test_what_the_struct_cannot_hold_fails_the_load(tmp_path, changed, rule, key, said):
    rewritten = agent_rewrite(settings(tmp_path, **changed), "mlserver", name="m")
    assert (rewritten.refused, rewritten.files, rewritten.copies) == (True, {}, {})
    found = only(rewritten.findings, rule=rule)
    assert (found.key, found.severity) == (key, "error")
    assert said in found.message
    assert "the load fails" in found.message


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": NaN}', "\ufeff{}", "1"])
def test_settings_that_are_no_json_object(tmp_path, text):
    found = only(check_roundtrip(folder(tmp_path, {"model-settings.json": text}), "mlserver"), rule="C104")
    assert found.severity == "error"


def test_settings_that_are_not_utf_8(tmp_path):
    (tmp_path / "model-settings.json").write_bytes(b'{"name": "\xff"}')
    assert only(check_roundtrip(tmp_path, "mlserver"), rule="C104").severity == "error"


@pytest.mark.parametrize(
    ("changed", "rule", "severity", "said"),
    [
        ({"implementation": None}, "C109", "error", "no runtime is named"),
        ({"parallel_workers": 4}, "C110", "warning", "no effect"),
        ({"parallel_workers": 0}, "C110", "info", "server's own process"),
        ({"parameters": {"uri": "./other.onnx"}}, "C111", "error", "not in the folder"),
        ({"parameters": {"uri": "../model.onnx"}}, "C111", "error", "leaves the folder"),
        ({"parameters": {"uri": "/mnt/model.onnx"}}, "C111", "warning", "not in the artifact"),
        ({"parameters": {"uri": "s3://b/m.onnx"}}, "C111", "warning", "not in the artifact"),
        ({"parameters": {"environment_tarball": "env.tar.gz"}}, "C111", "error", "not in the folder"),
        (
            {"implementation": "mlserver_sklearn.SKLearnModel", "parameters": {"extra": {"max_batch_size": "8"}}},
            "C112",
            "warning",
            "stock runtimes do not",
        ),
        ({"parameters": {"extra": {"max_batch_size": "8"}}}, "C113", "warning", "max_batch_time"),
        ({"parameters": {"extra": {"max_batch_time": "0.1"}}}, "C113", "warning", "max_batch_size"),
    ],
)
def test_what_is_kept_and_cannot_work(tmp_path, changed, rule, severity, said):
    found = only(check_roundtrip(settings(tmp_path, **changed), "mlserver"), rule=rule)
    assert found.severity == severity
    assert said in found.message


@pytest.mark.parametrize("uri", ["./", ".", "model.onnx", "./model.onnx", "sub/../model.onnx", "sub"])
def test_a_uri_within_the_folder(tmp_path, uri):
    folder(tmp_path, {"sub/weights.bin": ""})
    assert serious(check_roundtrip(settings(tmp_path, parameters={"uri": uri}), "mlserver")) == []


def test_batching_in_extra_makes_its_loss_harmless_where_our_runtime_reads_it(tmp_path):
    extra = {"max_batch_size": "8", "max_batch_time": "0.1"}
    both = {"max_batch_size": 8, "max_batch_time": 0.1, "parameters": {"extra": extra}}
    assert serious(check_roundtrip(settings(tmp_path / "ours", **both), "mlserver")) == []
    stock = settings(tmp_path / "stock", **both, implementation="mlserver_sklearn.SKLearnModel")
    found = [(found.rule, found.key) for found in serious(check_roundtrip(stock, "mlserver"))]
    assert ("C101", "/max_batch_size") in found
    assert ("C101", "/max_batch_time") in found


def test_the_models_parameters_are_merged_into_extra_as_texts(tmp_path):
    at = settings(tmp_path, parameters={"extra": {"threads": 2, "engine": "onnxruntime"}})
    rewritten = agent_rewrite(at, "mlserver", name="m", parameters={"threads": "4", "max_batch_size": "8"})
    after = json.loads(rewritten.files["m_1/1/model-settings.json"])
    assert after["parameters"]["extra"] == {"engine": "onnxruntime", "max_batch_size": "8", "threads": "4"}
    assert only(rewritten.findings, rule="C108").message == "the Model's '4' takes the place of 2 in parameters.extra"


def test_a_parameter_that_is_no_text_is_refused(tmp_path):
    rewritten = agent_rewrite(settings(tmp_path), "mlserver", name="m", parameters={"threads": 4})
    found = only(rewritten.findings, rule="C107")
    assert (rewritten.refused, found.file, found.key) == (True, "parameters", "/threads")


def test_keys_are_found_without_regard_to_case_as_go_does(tmp_path):
    at = folder(tmp_path, {"model-settings.json": {"Implementation": "a.B", "parameters": {"URI": "./"}}})
    assert served(at) == {"implementation": "a.B", "parameters": {"uri": "./", "version": "1"}, "name": "m_1"}


TENSORS = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.text(min_size=1),
            "shape": st.lists(st.integers(-1, 2**40), min_size=1),
            "datatype": st.sampled_from(["FP32", "INT64"]),
        }
    ),
    min_size=1,
    max_size=3,
)
WORDS = st.text(min_size=1, max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
KEPT = st.fixed_dictionaries(
    {"name": WORDS, "implementation": WORDS},
    optional={
        "platform": WORDS,
        "versions": st.lists(WORDS, min_size=1),
        "parallel_workers": st.integers(-1, 8),
        "inputs": TENSORS,
        "outputs": TENSORS,
        "parameters": st.fixed_dictionaries(
            {},
            optional={
                "uri": st.just("./"),
                "version": WORDS,
                "format": WORDS,
                "content_type": WORDS,
                "extra": st.dictionaries(WORDS, JSON, min_size=1, max_size=4),
                "environment_tarball": st.just("env.tar.gz"),
            },
        ),
    },
)


@given(KEPT)
def test_settings_of_kept_keys_only_are_the_same_but_for_name_and_version(tmp_path_factory, content):
    at = folder(tmp_path_factory.mktemp("kept"), {"model-settings.json": content, "env.tar.gz": ""})
    rewritten = agent_rewrite(at, "mlserver", name="m", version=3)
    parameters = {**content.get("parameters", {}), "version": "1"}
    expected = {**content, "name": "m_3", "parameters": parameters}
    assert json.loads(rewritten.files["m_3/1/model-settings.json"]) == expected
    assert not [found for found in rewritten.findings if found.severity == "error"]


KNOWN = ["implementation", "platform", "versions", "parallel_workers", "inputs", "outputs", "parameters", "Name"]
ANY_SETTINGS = st.dictionaries(
    st.sampled_from([*KNOWN, "max_batch_size", "cache_enabled"]) | WORDS,
    JSON
    | TENSORS
    | st.dictionaries(st.sampled_from(["uri", "extra", "format", "environment_path"]) | WORDS, JSON, max_size=4),
    max_size=5,
)


@given(ANY_SETTINGS)
def test_nothing_is_lost_without_a_word(tmp_path_factory, content):
    at = folder(tmp_path_factory.mktemp("any"), {"model-settings.json": content})
    rewritten = agent_rewrite(at, "mlserver", name="m")
    if rewritten.refused:
        assert rewritten.findings[-1].severity == "error"
        return
    after = json.loads(rewritten.files["m_1/1/model-settings.json"])
    named = {found.key for found in rewritten.findings}
    given_parameters = {key: value for key, value in content.items() if key.lower() == "parameters"}
    for before, kept, at_key in [
        (content, after, ""),
        *((value or {}, after["parameters"], f"/{key.lower()}") for key, value in given_parameters.items()),
    ]:
        for key, value in before.items():
            pointer = f"{at_key}/{key.replace('~', '~0').replace('/', '~1')}"
            folded = key if key in kept else key.lower()
            assert folded in kept or pointer in named or value in (None, "", [], {}), pointer


@given(
    st.text(max_size=40)
    | st.sampled_from(["{", "name:", "a { b: 1 }", "input { dims: 9999999999999999999 }", "[x]: 1"])
)
def test_any_text_is_a_configuration_or_is_refused(tmp_path_factory, text):
    at = tmp_path_factory.mktemp("any")
    (at / "config.pbtxt").write_bytes(text.encode())
    rewritten = agent_rewrite(at, "triton", name="m")
    assert rewritten.refused == any(found.severity == "error" for found in rewritten.findings)


# --- folders -----------------------------------------------------------------------------------------------------

AT_TOP: dict[str, Any] = {"model-settings.json": OURS, "model.onnx": "top"}
IN_2: dict[str, Any] = {"2/model-settings.json": OURS, "2/model.onnx": "two"}
IN_10: dict[str, Any] = {"10/model-settings.json": OURS, "10/model.onnx": "ten"}


@pytest.mark.parametrize(
    ("files", "asked", "taken", "rules"),
    [
        (AT_TOP, None, "top", []),
        (AT_TOP, 5, "top", ["C202"]),
        ({**AT_TOP, **IN_2}, 2, "top", ["C202", "C203"]),
        ({**IN_2, **IN_10}, None, "ten", []),
        ({**IN_2, **IN_10}, 2, "two", []),
        ({**IN_2, "old/model-settings.json": OURS}, None, "two", []),
        ({**AT_TOP, "settings.json": {}}, None, "top", ["C204"]),
    ],
)
def test_the_folder_that_mlserver_gets(tmp_path, files, asked, taken, rules):
    rewritten = agent_rewrite(folder(tmp_path, files), "mlserver", name="m", artifact_version=asked)
    assert rewritten.copies["m_1/1/model.onnx"].read_text() == taken
    assert [found.rule for found in serious(rewritten.findings)] == rules


@pytest.mark.parametrize(
    ("files", "asked", "said"),
    [
        ({**IN_2, **IN_10}, 3, "no folder named 3"),
        ({**IN_2, "a/2/model-settings.json": OURS}, 2, "2 folders named 2"),
        ({"digits/model-settings.json": OURS, "settings.json": {}}, None, "neither the top nor a folder named by"),
        ({"model.onnx": ""}, None, "there is no model-settings.json"),
    ],
)
def test_a_folder_that_mlserver_cannot_load(tmp_path, files, asked, said):
    rewritten = agent_rewrite(folder(tmp_path, files), "mlserver", name="m", artifact_version=asked)
    found = only(rewritten.findings, rule="C201")
    assert rewritten.refused
    assert said in found.message
    assert "\n" not in found.message


@pytest.mark.parametrize(
    ("requirement", "files", "implementation", "uri"),
    [
        ("sklearn", {"model.joblib": ""}, "mlserver_sklearn.SKLearnModel", "./model.joblib"),
        ("xgboost", {"model.json": ""}, "mlserver_xgboost.XGBoostModel", "./model.json"),
        ("lightgbm", {"model.bst": ""}, "mlserver_lightgbm.LightGBMModel", "./model.bst"),
        ("mlflow", {"MLmodel": ""}, "mlserver_mlflow.MLflowRuntime", "./"),
        ("alibi-detect", {"x": ""}, "mlserver_alibi_detect.AlibiDetectRuntime", "./"),
        ("alibi-explain", {"saved/x": ""}, "mlserver_alibi_explain.AlibiExplainRuntime", "./saved"),
        ("python", {"mine.py": "class Mine(MLModel):\n    pass\n"}, "mine.Mine", "./mine.py"),
    ],
)
def test_settings_are_made_for_stock_runtimes(tmp_path, requirement, files, implementation, uri):
    after = served(folder(tmp_path, files), requirements=["mlserver", requirement])
    assert (after["implementation"], after["parameters"]["uri"]) == (implementation, uri)


@pytest.mark.parametrize("requirement", ["sklearn", "python", "alibi-explain"])
def test_settings_that_cannot_be_made(tmp_path, requirement):
    at = folder(tmp_path, {"model.onnx": "", "other.py": "x = 1"})
    rewritten = agent_rewrite(at, "mlserver", name="m", requirements=[requirement])
    assert f"none can be made for {requirement}" in only(rewritten.findings, rule="C201").message


@pytest.mark.parametrize(
    ("files", "asked", "taken"),
    [
        ({"config.pbtxt": "", "1/model.onnx": "one"}, None, "one"),
        ({"config.pbtxt": "", "2/model.onnx": "two", "10/model.onnx": "ten"}, None, "ten"),
        ({"config.pbtxt": "", "2/model.onnx": "two", "10/model.onnx": "ten"}, 2, "two"),
        ({"config.pbtxt": "", "model.onnx": "top"}, None, "top"),
        ({"config.pbtxt": "", "model.onnx": "top", "0/model.onnx": "zero"}, None, "top"),
        ({"1/model.onnx": "one"}, None, "one"),
    ],
)
def test_the_folder_that_triton_gets(tmp_path, files, asked, taken):
    rewritten = agent_rewrite(folder(tmp_path, files), "triton", name="m", artifact_version=asked)
    assert rewritten.copies["m_1/1/model.onnx"].read_text() == taken
    assert rewritten.files["m_1/config.pbtxt"].decode() == 'name: "m_1"\n'
    assert serious(rewritten.findings) == []


def test_labels_go_beside_the_configuration_and_other_versions_stay(tmp_path):
    at = folder(tmp_path, {"config.pbtxt": "", "labels.txt": "", "1/a.onnx": "", "2/model.onnx": "", "docs/x.md": ""})
    rewritten = agent_rewrite(at, "triton", name="m")
    assert sorted(rewritten.copies) == ["m_1/1/model.onnx", "m_1/labels.txt"]


@pytest.mark.parametrize(
    ("files", "asked", "rule", "said"),
    [
        ({"1/model.onnx": ""}, 2, "C201", "no folder named 2 at the top"),
        ({"m/config.pbtxt": "", "m/model.onnx": ""}, None, "C201", "config.pbtxt is in 'm'"),
        ({"m/config.pbtxt": "", "m/1/model.onnx": ""}, None, "C207", "m/1 is taken"),
        ({"config.pbtxt": "", "1/model.onnx": "", "assets/2024/x": ""}, None, "C207", "assets/2024 is taken"),
    ],
)
def test_a_folder_that_triton_cannot_load(tmp_path, files, asked, rule, said):
    rewritten = agent_rewrite(folder(tmp_path, files), "triton", name="m", artifact_version=asked)
    found = only(rewritten.findings, rule=rule)
    assert found.severity == "error"
    assert said in found.message


def test_laying_out_leaves_the_artifacts_files_alone(tmp_path):
    at = settings(tmp_path / "artifact")
    (at / "model.onnx").write_text("weights")
    before = {path: path.read_bytes() for path in at.iterdir()}
    for _ in range(2):
        agent_rewrite(at, "mlserver", name="m").lay_out(tmp_path / "models")
    laid = tmp_path / "models/m_1/1"
    assert sorted(path.name for path in laid.iterdir()) == ["model-settings.json", "model.onnx"]
    assert json.loads((laid / "model-settings.json").read_text())["name"] == "m_1"
    (at / "model.onnx").unlink()
    (at / "model.onnx").write_text("new weights")
    agent_rewrite(at, "mlserver", name="m").lay_out(tmp_path / "models")
    assert (laid / "model.onnx").read_text() == "new weights"
    assert (at / "model-settings.json").read_bytes() == before[at / "model-settings.json"]


@pytest.mark.parametrize("name", ["", "Digits", "a_b", "-a", "a-", "a.b", "ä", "a\n"])
def test_a_name_that_core_2_refuses(tmp_path, name):
    with pytest.raises(InputError, match="refuses a model"):
        agent_rewrite(settings(tmp_path), "mlserver", name=name)


def test_a_folder_that_is_none_or_empty(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        check_roundtrip(tmp_path / "none", "triton")
    with pytest.raises(InputError, match="is empty"):
        check_roundtrip(tmp_path, "triton")
    with pytest.raises(InputError, match="no server 'kserve'"):
        check_roundtrip(settings(tmp_path), "kserve")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("files", "server"),
    [
        (AT_TOP, "mlserver"),
        (IN_2, "mlserver"),
        ({"config.pbtxt": ""}, "triton"),
        ({"1/model.onnx": ""}, "triton"),
        ({"model.onnx": ""}, None),
        ({"config.pbtxt": "", **AT_TOP}, None),
    ],
)
def test_which_server_a_folder_is_for(tmp_path, files, server):
    folder(tmp_path, files)
    if server is None:
        with pytest.raises(InputError, match=r"\A.*\nSay which server"):
            guess_server(tmp_path)
    else:
        assert guess_server(tmp_path) == server


# --- config.pbtxt: field by field --------------------------------------------------------------------------------

STATE = "state { input_name: 'a' output_name: 'b' "


@pytest.mark.parametrize(
    ("text", "key", "rule", "way"),
    [
        ("input { data_type: TYPE_BF16 dims: 1 }", "input[0].data_type", "C302", "TYPE_FP32"),
        ("output { } output { data_type: TYPE_BF16 }", "output[1].data_type", "C302", "TYPE_FP32"),
        ("model_warmup { count: 3 }", "model_warmup[0].count", "C301", "runs once"),
        (
            "model_warmup { inputs { key: 'x' value { data_type: TYPE_BF16 } } }",
            "model_warmup[0].inputs['x'].data_type",
            "C302",
            "cast",
        ),
        ("model_metrics { }", "model_metrics", "C301", "--metrics-config"),
        ("runtime: 'x'", "runtime", "C301", "backend"),
        ("input { is_non_linear_format_io: true }", "input[0].is_non_linear_format_io", "C301", "Leave it out"),
        ("output { is_non_linear_format_io: true }", "output[0].is_non_linear_format_io", "C301", "Leave it out"),
        ("batch_input { kind: BATCH_ITEM_SHAPE }", "batch_input[0].kind", "C302", "Leave it out"),
        ("sequence_batching { iterative_sequence: true }", "sequence_batching.iterative_sequence", "C301", ""),
        (
            "sequence_batching { oldest { preserve_ordering: true } }",
            "sequence_batching.oldest.preserve_ordering",
            "C301",
            "",
        ),
        (
            f"sequence_batching {{ {STATE} use_growable_memory: true }} }}",
            "sequence_batching.state[0].use_growable_memory",
            "C301",
            "",
        ),
        (
            f"sequence_batching {{ {STATE} use_same_buffer_for_input_output: true }} }}",
            "sequence_batching.state[0].use_same_buffer_for_input_output",
            "C301",
            "",
        ),
        (
            "ensemble_scheduling { step { model_namespace: 'a' } }",
            "ensemble_scheduling.step[0].model_namespace",
            "C301",
            "",
        ),
        ("ensemble_scheduling { max_inflight_requests: 1 }", "ensemble_scheduling.max_inflight_requests", "C301", ""),
    ],
)
def test_what_came_after_january_2022_fails_the_load(tmp_path, text, key, rule, way):
    rewritten = agent_rewrite(config(tmp_path, text), "triton", name="m")
    assert (rewritten.refused, rewritten.files) == (True, {})
    found = only(rewritten.findings, rule=rule)
    assert (found.key, found.severity, found.file) == (key, "error", "config.pbtxt")
    assert way in found.way


def test_every_field_that_is_too_new_is_named(tmp_path):
    text = "runtime: 'x' model_warmup { count: 1 } input { data_type: TYPE_BF16 }"
    found = check_roundtrip(config(tmp_path, text), "triton")
    assert {finding.key for finding in found} == {"runtime", "model_warmup[0].count", "input[0].data_type"}


def test_a_new_field_that_is_given_its_default_still_fails_the_load(tmp_path):
    found = only(check_roundtrip(config(tmp_path, "model_warmup { count: 0 }"), "triton"), rule="C301")
    assert "count" in found.message


@pytest.mark.parametrize(
    "text", ["max_batch_size: 'a'", "input {", "max_batch_sise: 1", "max_batch_size: 1 max_batch_size: 2"]
)
def test_a_configuration_that_nothing_can_read(tmp_path, text):
    found = only(check_roundtrip(config(tmp_path, text), "triton"), rule="C303")
    assert found.severity == "error"
    assert "1:" in found.message
    assert "\n" not in found.message


def test_a_configuration_that_is_not_text(tmp_path):
    at = folder(tmp_path, {"1/model.onnx": ""})
    (at / "config.pbtxt").write_bytes(b"\xff\xfe")
    assert only(check_roundtrip(at, "triton"), rule="C303").way == "Save it as UTF-8."


OLD = """
name: "all" platform: "p" backend: "b" version_policy { latest { num_versions: 2 } } max_batch_size: 8
input { name: "a" data_type: TYPE_FP16 format: FORMAT_NCHW dims: [ 3, 2, 2 ] reshape { shape: 12 }
  is_shape_tensor: true allow_ragged_batch: true optional: true }
output { name: "b" data_type: TYPE_STRING dims: -1 label_filename: "labels.txt" is_shape_tensor: true }
batch_input { kind: BATCH_MAX_ELEMENT_COUNT_AS_SHAPE target_name: "t" data_type: TYPE_INT32 source_input: "a" }
batch_output { target_name: "b" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "a" }
optimization { graph { level: 1 } priority: PRIORITY_MAX
  cuda { graphs: true busy_wait_events: true output_copy_stream: true graph_spec { batch_size: 1
    input { key: "a" value { dim: 1 } } graph_lower_bound { batch_size: 1 input { key: "a" value { dim: 1 } } } } }
  execution_accelerators { gpu_execution_accelerator { name: "tensorrt" parameters { key: "k" value: "v" } }
    cpu_execution_accelerator { name: "openvino" } }
  input_pinned_memory { enable: true } output_pinned_memory { enable: true }
  gather_kernel_buffer_threshold: 1 eager_batching: true }
dynamic_batching { preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 5 preserve_ordering: true
  priority_levels: 2 default_priority_level: 1 default_queue_policy { timeout_action: DELAY
    default_timeout_microseconds: 1 allow_timeout_override: true max_queue_size: 2 }
  priority_queue_policy { key: 1 value { max_queue_size: 2 } } }
instance_group { name: "g" kind: KIND_CPU count: 1 rate_limiter { resources { name: "r" global: true count: 1 }
  priority: 2 } secondary_devices { kind: KIND_NVDLA device_id: 0 } profile: "0" passive: false host_policy: "h" }
cc_model_filenames { key: "7.5" value: "m" } metric_tags { key: "a" value: "b" }
parameters { key: "k" value { string_value: "v" } }
model_warmup { name: "w" batch_size: 1 inputs { key: "a" value { data_type: TYPE_FP16 dims: 1 zero_data: true } } }
model_operations { op_library_filename: "l" } model_transaction_policy { decoupled: true }
model_repository_agents { agents { name: "a" parameters { key: "k" value: "v" } } } response_cache { enable: true }
# A comment, which is lost.
"""


def without_dynamic_batching(text: str) -> str:
    """The configuration with a scheduler for sequences instead; a model has one of the two."""
    sequences = "sequence_batching { max_sequence_idle_microseconds: 1 oldest { max_candidate_sequences: 4 } }\n"
    return text[: text.index("dynamic_batching")] + sequences + text[text.index("instance_group") :]


@pytest.mark.parametrize("text", [OLD, without_dynamic_batching(OLD)], ids=["dynamic", "sequences"])
def test_what_was_there_in_january_2022_comes_through(tmp_path, text):
    at = folder(tmp_path, {"config.pbtxt": text, "1/model.onnx": ""})
    rewritten = agent_rewrite(at, "triton", name="m")
    assert serious(rewritten.findings) == []
    before = text_format.Parse(text, model_config_pb2.ModelConfig())
    before.name = "m_1"
    after = text_format.Parse(rewritten.files["m_1/config.pbtxt"].decode(), model_config_pb2.ModelConfig())
    assert after == before


def test_the_older_schema_is_not_the_newer_one():
    assert parse('name: "a"').name == "a"
    with pytest.raises(ConfigError, match=r'no field named "runtime"'):
        parse('runtime: "a"')


@pytest.mark.parametrize(
    ("text", "rule", "severity", "key"),
    [
        ("version_policy { specific { versions: 2 } }", "C304", "error", "version_policy.specific.versions"),
        ("version_policy { specific { versions: [1, 2] } }", "C304", "warning", "version_policy.specific.versions"),
        ("instance_group { kind: KIND_CPU count: 3 }", "C307", "info", "instance_group[0].count"),
        ("instance_group { kind: KIND_GPU count: 2 }", "C308", "info", "instance_group[0].count"),
        ("instance_group { kind: KIND_AUTO count: 2 }", "C308", "warning", "instance_group[0].count"),
        (
            "instance_group { kind: KIND_CPU count: 1 } instance_group { kind: KIND_CPU count: 1 }",
            "C308",
            "warning",
            "instance_group[1].count",
        ),
        ("default_model_filename: 'other.onnx'", "C309", "error", "default_model_filename"),
    ],
)
def test_what_triton_is_told_and_core_2_does_otherwise(tmp_path, text, rule, severity, key):
    found = only(check_roundtrip(config(tmp_path, text), "triton"), rule=rule)
    assert (found.severity, found.key) == (severity, key)


@pytest.mark.parametrize("policy", ["latest { num_versions: 1 }", "all { }", "specific { versions: 1 }"])
def test_version_policies_that_hold_for_one_version(tmp_path, policy):
    at = config(tmp_path, f"version_policy {{ {policy} }}")
    assert check_roundtrip(at, "triton") == ()


def test_the_models_parameters_do_not_reach_triton(tmp_path):
    found = only(check_roundtrip(config(tmp_path, ""), "triton", parameters={"threads": "2"}), rule="C306")
    assert (found.severity, found.file, found.key) == ("error", "parameters", "/threads")
    assert "string_value" in found.way


def test_a_missing_configuration_is_written_with_nothing_but_the_name(tmp_path):
    found = only(check_roundtrip(folder(tmp_path, {"1/model.onnx": ""}), "triton"), rule="C305")
    assert found.severity == "info"


# --- the URI -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "remotes", "rule", "severity"),
    [
        ("mlflow://models/a", None, "C401", "error"),
        ("models:/digits/3", None, "C401", "error"),
        ("models:/digits@champion", ["s3"], "C401", "error"),
        ("runs:/0123/model", None, "C401", "error"),
        ("mlflow-artifacts:/1/2", None, "C401", "error"),
        ("https://host/model", None, "C402", "error"),
        ("http://host/model", ["s3"], "C402", "error"),
        ("https://host/model", ["https"], None, None),
        ("file:///mnt/models/a", None, "C402", "error"),
        ("gs://bucket/a", None, None, None),
        ("gs://bucket/a", ["s3"], "C403", "error"),
        ("s3://bucket/a", None, "C403", "warning"),
        ("s3://bucket/a", ["gs"], "C403", "error"),
        ("s3://bucket/a", ["gs", "s3"], None, None),
        ("minio:bucket/a", ["minio"], None, None),
        (":s3,provider=Minio:bucket/a", None, "C403", "warning"),
        ("/mnt/models/a", None, "C404", "info"),
        ("/mnt/a:b", None, "C404", "info"),
        ("models/a", None, "C404", "error"),
        ("", None, "C404", "error"),
        ("s3://", ["s3"], "C404", "error"),
    ],
)
def test_where_core_2_can_fetch_from(uri, remotes, rule, severity):
    found = check_uri(uri, remotes=remotes)
    assert [(finding.rule, finding.severity) for finding in found] == ([] if rule is None else [(rule, severity)])
    assert all(finding.way and finding.file == "storageUri" for finding in found)


# --- the command -------------------------------------------------------------------------------------------------


def lint(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["burnish", "lint", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_lint_says_what_is_lost_and_ends_with_5(monkeypatch, capsys, tmp_path):
    at = settings(tmp_path, max_batch_size=8, max_batch_time=0.1)
    assert lint(monkeypatch, "--core2", str(at)) == 5
    said = capsys.readouterr().out
    assert "C101 error   model-settings.json /max_batch_size: lost" in said
    assert "2 errors, 0 warnings" in said


def test_lint_is_content_with_what_comes_through(monkeypatch, capsys, tmp_path):
    at = config(tmp_path, "max_batch_size: 8 dynamic_batching { }")
    assert lint(monkeypatch, "--core2", str(at), "--uri", "s3://b/a", "--remote", "s3", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["server"], told["uri"], told["error"], told["findings"]) == ("triton", "s3://b/a", 0, [])


def test_lint_of_a_uri_that_cannot_be_fetched(monkeypatch, capsys, tmp_path):
    assert lint(monkeypatch, "--core2", str(settings(tmp_path)), "--uri", "models:/digits/3", "--json") == 5
    assert [found["rule"] for found in json.loads(capsys.readouterr().out)["findings"]] == ["C401"]


def test_lint_of_a_uri_alone_says_where_an_artifact_of_mlflow_is(monkeypatch, capsys):
    monkeypatch.setattr(storage_uris, "artifact_location", lambda uri, tracking_uri: "s3://mlflow/1/artifacts/model")
    assert lint(monkeypatch, "--uri", "models:/digits/3", "--remote", "minio", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["storage_uri"], told["findings"]) == ("minio://mlflow/1/artifacts/model", [])
    assert lint(monkeypatch, "--uri", "models:/digits/3", "--remote", "minio") == 0
    assert "models:/digits/3 is minio://mlflow/1/artifacts/model to the cluster's rclone" in capsys.readouterr().out
    assert lint(monkeypatch, "--uri", "models:/digits/3") == 2  # what the cluster calls the bucket, nobody knows
    assert lint(monkeypatch, "--uri", "https://host/model") == 5
    assert "C402" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to check"),
        (["--core2", "{}", "--server", "kserve"], "no server 'kserve'"),
        (["--core2", "{}", "model.onnx"], "does not go with a model"),
        (["--core2", "{}", "--triton", "23.03"], "does not go with --triton"),
        (["--core2", "{}"], "no model-settings.json, config.pbtxt or folder"),
    ],
)
def test_lint_of_what_cannot_be_checked(monkeypatch, capsys, tmp_path, arguments, said):
    folder(tmp_path, {"model.onnx": ""})
    assert lint(monkeypatch, *(argument.format(tmp_path) for argument in arguments)) == 2
    assert said in capsys.readouterr().err
