import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.serving.mlserver import render_mlserver
from profiles.serving.naming import model_name_of, why_not_batched
from registry.errors import InputError
from registry.records import Artifact, EngineSpec, TensorSpec
from tests.doubles.candidates import candidate

GOLDEN = Path(__file__).parents[2] / "golden"
PORTS = {"http_port": 8080, "grpc_port": 8081, "metrics_port": 8082}


def artifact(
    shape: tuple[int | str | None, ...] = ("batch", 8), out: tuple[int | str | None, ...] = ("batch", 4)
) -> Artifact:
    return Artifact(
        digest="0" * 64,
        format="onnx",
        entry="model.onnx",
        files=(),
        inputs=(TensorSpec(name="x", dtype="float32", shape=shape),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=out),),
    )


def test_matches_the_golden_files() -> None:
    served = candidate(
        variant="digits/int8-static",
        engine=EngineSpec(name="openvino", precision="float32"),
        max_batch_size=8,
        max_batch_delay_ms=2.5,
        threads=2,
    )
    files = render_mlserver(served, artifact(), model_name="digits", **PORTS)
    assert sorted(files) == ["digits/model-settings.json", "settings.json"]
    assert files["settings.json"] == (GOLDEN / "mlserver-settings.json").read_text()
    assert files["digits/model-settings.json"] == (GOLDEN / "mlserver-model-settings.json").read_text()


def test_no_batching_leaves_no_trace() -> None:
    files = render_mlserver(candidate(), artifact(), model_name="m", **PORTS)
    extra = json.loads(files["m/model-settings.json"])["parameters"]["extra"]
    assert not {key for key in extra if "batch" in key}


def test_every_extra_parameter_is_a_string_as_core_2_makes_it() -> None:
    served = candidate(max_batch_size=4, max_batch_delay_ms=1.0, threads=3)
    extra = json.loads(render_mlserver(served, artifact(), model_name="m", **PORTS)["m/model-settings.json"])
    assert {type(value) for value in extra["parameters"]["extra"].values()} == {str}
    assert extra["parameters"]["extra"]["max_batch_time"] == "0.001"


def test_parallel_workers_are_the_servers_setting() -> None:
    files = render_mlserver(candidate(parallel_workers=2), artifact(), model_name="m", **PORTS)
    assert json.loads(files["settings.json"])["parallel_workers"] == 2


@pytest.mark.parametrize(
    ("served", "model", "said"),
    [
        (candidate(server="triton"), artifact(), "not for our MLServer runtime"),
        (candidate(instances=2), artifact(), "2 instances"),
        (candidate(max_batch_size=8), artifact(), "no delay"),
        (candidate(max_batch_size=0), artifact(), "is 0"),
        (candidate(max_batch_size=8, max_batch_delay_ms=1), artifact(()), "'x' is a scalar"),
        (candidate(max_batch_size=8, max_batch_delay_ms=1), artifact((1, 8)), r"do not share .*x 1, logits batch"),
        (candidate(max_batch_size=8, max_batch_delay_ms=1), artifact((64, 8), (10, 2)), "do not share"),
    ],
)
def test_refuses_what_would_have_no_effect(served: object, model: Artifact, said: str) -> None:
    with pytest.raises(InputError, match=said):
        render_mlserver(served, model, model_name="m", **PORTS)


def test_a_shared_fixed_batch_can_be_batched() -> None:
    assert why_not_batched(artifact((1, 8), (1, 4))) is None


@given(st.text(max_size=100), st.text("0123456789abcdef", min_size=16, max_size=16))
def test_names_fit_servers_and_kubernetes(variant: str, number: str) -> None:
    name = model_name_of(dataclasses.replace(candidate(variant=variant), id=number))
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 63
    assert name.endswith(number[:8])


def test_the_name_says_which_variant() -> None:
    assert model_name_of(dataclasses.replace(candidate(variant="Digits/INT8 static"), id="0123456789abcdef")) == (
        "digits-int8-static-01234567"
    )
