import dataclasses
import inspect
import math
import typing
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import records
from registry.records import (
    Artifact,
    ArtifactFile,
    EngineSpec,
    Estimate,
    GateFinding,
    LoadProfile,
    OpenLoop,
    RunRecord,
    ServingProfile,
    exact,
)

CLASSES = [one for one in vars(records).values() if inspect.isclass(one) and one.__module__ == records.__name__]


@pytest.mark.parametrize("record", CLASSES, ids=lambda one: one.__name__)
def test_every_record_is_frozen_keyword_only_and_slotted(record):
    assert dataclasses.is_dataclass(record)
    assert record.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(record))
    assert "__slots__" in vars(record)


@pytest.mark.parametrize("record", CLASSES, ids=lambda one: one.__name__)
def test_no_record_holds_what_can_be_changed_in_place(record):
    for name, hint in typing.get_type_hints(record).items():
        origins = {typing.get_origin(part) or part for part in _parts(hint)}
        assert not origins & {list, dict, set, bytearray}, name


def _parts(hint):
    yield hint
    for part in typing.get_args(hint):
        yield from _parts(part)


def test_there_are_records_to_look_at():
    assert len(CLASSES) > 30
    assert Mapping not in CLASSES


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["value", "low", "high"])
def test_an_estimate_is_finite(place, wrong):
    fields = {"value": 1.0, "low": 0.0, "high": 2.0, place: wrong}
    with pytest.raises(ValueError, match="finite"):
        Estimate(**fields, runs=1, method="m", unit="1")


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_the_ends_of_an_estimate_are_in_order(one, other):
    low, high = sorted((one, other))
    Estimate(value=0.0, low=low, high=high, runs=1, method="m", unit="1")
    if low < high:
        with pytest.raises(ValueError, match="out of order"):
            Estimate(value=0.0, low=high, high=low, runs=1, method="m", unit="1")


def test_ends_may_be_unknown():
    assert Estimate(value=1.0, low=None, high=None, runs=1, method="single run", unit="ms").low is None


def test_what_is_counted_is_exact():
    assert exact(2.5, "MB") == Estimate(value=2.5, low=2.5, high=2.5, runs=1, method="exact", unit="MB")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({}, "mlserver-grpc-b1"),
        ({"max_batch_size": 8, "max_batch_delay_ms": 2.0}, "mlserver-grpc-b8-d2"),
        ({"parallel_workers": 2, "threads": 2, "protocol": "rest"}, "mlserver-rest-b1-w2-t2"),
        ({"server": "triton", "backend": "python", "instances": 2}, "triton-grpc-b1-i2"),
        ({"server": "triton", "backend": "onnxruntime", "max_batch_delay_ms": 0.5}, "triton-grpc-b1-d0.5-onnxruntime"),
    ],
)
def test_the_key_of_a_serving_profile_names_what_is_set(changes, key):
    assert ServingProfile(**{"server": "mlserver", "backend": "burnish", **changes}).key == key


profiles = st.builds(
    ServingProfile,
    server=st.sampled_from(["mlserver", "triton"]),
    backend=st.sampled_from(["burnish", "python", "onnxruntime", "openvino"]),
    protocol=st.sampled_from(["grpc", "rest"]),
    max_batch_size=st.integers(1, 64),
    max_batch_delay_ms=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    instances=st.integers(1, 4),
    parallel_workers=st.integers(0, 4),
    threads=st.integers(1, 4),
)


@given(profiles, profiles)
def test_two_profiles_have_one_key_only_if_they_are_one(one, other):
    native = {"burnish": "mlserver", "python": "triton"}
    for profile in (one, other):
        if native.get(profile.backend, profile.server) != profile.server:
            return  # no server has this backend
    assert (one.key == other.key) == (one == other)


def test_the_key_of_an_engine_names_its_settings():
    assert EngineSpec(name="openvino", precision="float32").key == "openvino.float32.all"


def test_an_artifact_is_as_large_as_its_files():
    files = tuple(ArtifactFile(path=name, sha256="0", size_bytes=size) for name, size in (("a", 3), ("b", 4)))
    artifact = Artifact(digest="0", format="onnx", entry="a", files=files, inputs=(), outputs=())
    assert artifact.size_bytes == 7


def test_a_run_that_failed_a_gate_is_invalid():
    load = LoadProfile(name="100 rps", load=OpenLoop(rate_rps=100), warmup_s=1, duration_s=1)
    run = RunRecord(load=load, scheduled=1, ok=1, errors={}, window_s=1, metrics={}, findings=(), raw="")
    assert run.valid
    gate = GateFinding(gate="lateness", observed="9 ms", limit="1 ms")
    assert not dataclasses.replace(run, findings=(gate,)).valid
