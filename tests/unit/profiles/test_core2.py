import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from profiles.serving.container import container_environment
from profiles.serving.core2 import manifests, schema, sizing
from profiles.serving.core2.folder import model_folder, write_folder
from profiles.serving.core2.hardware import Hardware
from profiles.serving.naming import model_name_of, server_name_of
from registry.documents import parse_document
from registry.errors import InputError
from registry.records import Artifact, ArtifactFile, ServingProfile, TensorSpec
from tests.doubles import crds
from tests.doubles.candidates import candidate

GOLDEN = Path(__file__).parents[2] / "golden"
LABELS = {"burnish.campaign": "1e23456789012345", "burnish.variant": "0123456789abcdef"}
DIGEST = "9f86d081884c7d65"
BATCHED = candidate(variant="digits/int8-static", max_batch_size=8, max_batch_delay_ms=2.5, threads=2)
GPU_NODE = Hardware.model_validate(
    {
        "gpus": 1,
        "cpu": "4",
        "memory": "8Gi",
        "node_selector": {"cloud.google.com/gke-accelerator": "nvidia-l4"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "kmp_affinity": "granularity=fine,compact,1,0",
    }
)
INSTALLED = {
    "apiVersion": schema.MLOPS,
    "kind": "ServerConfig",
    "metadata": {"name": "triton", "resourceVersion": "17"},
    "spec": {
        "podSpec": {
            "containers": [
                {"name": "agent", "image": "agent:2.10", "volumeMounts": [{"name": "kept", "mountPath": "/mnt/agent"}]},
                {
                    "name": "triton",
                    "image": "t:23.03-py3",
                    "args": ["--log-verbose=1", "--model-control-mode=explicit"],
                },
            ]
        },
        "volumeClaimTemplates": [
            {"name": "kept", "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}}
        ],
    },
}


class Anything(BaseModel):
    """What a reader of YAML 1.2 makes of a document."""

    model_config = ConfigDict(extra="allow")


def artifact(*paths: str) -> Artifact:
    return Artifact(
        digest="0" * 64,
        format="onnx",
        entry="model.onnx",
        files=tuple(ArtifactFile(path=path, sha256="0" * 64, size_bytes=3) for path in paths or ("model.onnx",)),
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 8)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 4)),),
    )


def model(name: str = "digits", **given: Any) -> dict[str, Any]:
    return manifests.render_model(name, BATCHED, **{"storage_uri": "s3://m/digits", "labels": LABELS, **given})


def of_every_kind() -> dict[str, dict[str, Any]]:
    serving = ServingProfile(server="triton", backend="onnxruntime", instances=2)
    folder = model_folder(BATCHED, artifact(), model_name="digits")
    return {
        "model": model(
            storage_uri=f"s3://models/digits-{DIGEST}",
            extra=folder.extra,
            memory_bytes=300_000_000,
            server="burnish-mlserver-01234567",
            replicas=3,
        ),
        "server": manifests.render_server(
            "burnish-mlserver-01234567",
            dataclasses.replace(BATCHED.serving, parallel_workers=2),
            labels=LABELS,
            image="registry.example/burnish-serve:1",
            memory_bytes=300_000_000,
            replicas=3,
            max_replicas=6,
        ),
        "server-gpu": manifests.render_server(
            "triton-gpu", serving, labels=LABELS, memory_bytes=2_000_000_000, hardware=GPU_NODE
        ),
        "serverconfig": manifests.render_server_config(
            "triton-quiet", INSTALLED, labels=LABELS, server="triton", models_bytes=3 << 30
        ),
        "experiment": manifests.render_experiment(
            "digits-canary", {"digits": 90, "digits-int8": 10}, labels=LABELS, default="digits"
        ),
        "experiment-mirror": manifests.render_experiment(
            "digits-shadow", {"digits": 100}, labels=LABELS, default="digits", mirror=("digits-int8", 100)
        ),
        "pipeline": manifests.render_pipeline("digits-pipeline", ["digits"], labels=LABELS),
        "autoscaler": manifests.render_autoscaler(
            "digits", rate_rps=sizing.rate_per_replica(98.04), min_replicas=3, max_replicas=6, labels=LABELS
        ),
    }


EVERY = of_every_kind()


@pytest.mark.parametrize("name", EVERY)
def test_matches_the_golden_files(name: str) -> None:
    assert manifests.as_yaml(EVERY[name]) == (GOLDEN / f"core2-{name}.yaml").read_text()


def test_the_adapters_rule_matches_its_golden_file() -> None:
    text = manifests.as_yaml(manifests.adapter_rules())
    assert text == (GOLDEN / "core2-prometheus-adapter-values.yaml").read_text()


@pytest.mark.parametrize("name", EVERY)
def test_yaml_reads_back_as_what_was_written(name: str) -> None:
    assert parse_document(manifests.as_yaml(EVERY[name]), Anything, name=name).model_dump() == EVERY[name]


@pytest.mark.skipif(not crds.FOLDER.is_dir(), reason="the CRD files are not here")
@pytest.mark.parametrize("name", [name for name in EVERY if name != "autoscaler"])
def test_the_crds_take_every_manifest(name: str) -> None:
    assert crds.problems(EVERY[name]) == []


@pytest.mark.skipif(not crds.FOLDER.is_dir(), reason="the CRD files are not here")
def test_the_crds_of_2_6_lack_what_is_refused_for_it() -> None:
    cleaned = model(clean_topics=True)
    assert crds.problems(cleaned) == []
    assert crds.problems(cleaned, later=False) == ["Model.spec.dataflow is unknown"]


texts = st.text(max_size=12)
servings = st.builds(
    lambda ours, size, delay, copies, threads: (
        ServingProfile(
            server="mlserver",
            backend="burnish",
            max_batch_size=size,
            max_batch_delay_ms=delay,
            parallel_workers=copies - 1,
            threads=threads,
        )
        if ours
        else ServingProfile(
            server="triton",
            backend="onnxruntime",
            max_batch_size=size,
            max_batch_delay_ms=delay,
            instances=copies,
            threads=threads,
        )
    ),
    st.booleans(),
    st.integers(1, 64),
    st.floats(0.001, 50),
    st.integers(1, 5),
    st.integers(1, 16),
)


@given(
    variant=texts,
    serving=servings,
    peak_mb=st.none() | st.floats(1, 1e5),
    replicas=st.integers(1, 20),
    more=st.integers(0, 5),
    gpus=st.integers(0, 4),
)
def test_what_every_profile_gives_passes_both_checks_and_fits(
    variant: str, serving: ServingProfile, peak_mb: float | None, replicas: int, more: int, gpus: int
) -> None:
    served = dataclasses.replace(candidate(variant=variant), serving=serving)
    memory = None if peak_mb is None else sizing.memory_needed(peak_mb)
    folder = model_folder(served, artifact(), model_name=model_name_of(served))
    labels = manifests.labels_of(served, "0123456789abcdef")
    server = manifests.render_server(
        server_name_of(served),
        serving,
        labels=labels,
        image="i:1",
        memory_bytes=memory,
        hardware=Hardware(gpus=gpus),
        replicas=replicas,
        max_replicas=replicas + more,
    )
    rendered = manifests.render_model(
        model_name_of(served),
        served,
        storage_uri=f"gs://b/{folder.digest}",
        labels=labels,
        extra=folder.extra,
        memory_bytes=memory,
        server=server["metadata"]["name"],
        replicas=replicas,
    )
    if crds.FOLDER.is_dir():
        assert crds.problems(server) == crds.problems(rendered) == []
    # The capabilities match, and the agent, which counts each copy, finds room for all of them.
    assert set(rendered["spec"]["requirements"]) <= set(server["spec"]["capabilities"])
    if memory is not None:
        asked = server["spec"]["podSpec"]["containers"][0]["resources"]["requests"]["memory"]
        counted = sizing.counted_copies(serving) * sizing.quantity_bytes(rendered["spec"]["memory"])
        assert memory <= counted <= sizing.quantity_bytes(asked)


def test_memory_is_of_one_copy_and_absent_where_unmeasured() -> None:
    two = dataclasses.replace(BATCHED, serving=dataclasses.replace(BATCHED.serving, parallel_workers=2))
    made = manifests.render_model("m", two, storage_uri="/mnt/m", labels={}, memory_bytes=100 << 20)
    assert made["spec"]["memory"] == "50Mi"
    assert "memory" not in model()["spec"]
    server = manifests.render_server("s", BATCHED.serving, labels={}, image="i")
    assert "memory" not in server["spec"]["podSpec"]["containers"][0]["resources"]["requests"]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_agent_hears_of_workers_only_where_they_multiply_memory(workers: int) -> None:
    serving = dataclasses.replace(BATCHED.serving, parallel_workers=workers)
    made = manifests.render_server("s", serving, labels={}, image="i")
    assert [one["name"] for one in made["spec"]["podSpec"]["containers"]] == ["mlserver"]


def test_only_mlservers_models_get_parameters() -> None:
    served = dataclasses.replace(candidate(server="triton"), serving=EVERY_TRITON)
    made = manifests.render_model("m", served, storage_uri="/mnt/m", labels={}, extra={"threads": "2"})
    assert "parameters" not in made["spec"]
    assert made["spec"]["requirements"] == ["onnx"]


EVERY_TRITON = ServingProfile(server="triton", backend="onnxruntime")


@pytest.mark.parametrize(
    "serving", [dataclasses.replace(BATCHED.serving, parallel_workers=2), dataclasses.replace(EVERY_TRITON, threads=3)]
)
def test_a_server_has_the_environment_that_candidates_were_measured_in(serving: ServingProfile) -> None:
    made = manifests.render_server("s", serving, labels={}, image="i")
    env = {one["name"]: one["value"] for one in made["spec"]["podSpec"]["containers"][0]["env"]}
    measured = container_environment(serving)
    assert env == measured
    assert measured["OMP_NUM_THREADS"] == str(serving.threads)
    assert (
        ("MALLOC_TOP_PAD_" in measured) == ("MLSERVER_PARALLEL_WORKERS" in measured) == (serving.server == "mlserver")
    )


def test_stock_runtimes_are_batched_by_their_servers_environment() -> None:
    made = manifests.render_server("s", BATCHED.serving, labels={}, image="i", stock_batching=True)
    env = {one["name"]: one["value"] for one in made["spec"]["podSpec"]["containers"][0]["env"]}
    assert env["MLSERVER_MODEL_MAX_BATCH_SIZE"] == "8"
    assert env["MLSERVER_MODEL_MAX_BATCH_TIME"] == "0.0025"
    alone = dataclasses.replace(BATCHED.serving, max_batch_size=1)
    made = manifests.render_server("s", alone, labels={}, image="i", stock_batching=True)
    assert "MAX_BATCH" not in str(made)


def test_a_server_of_ours_needs_an_image_of_ours() -> None:
    with pytest.raises(InputError, match="no session of burnish's"):
        manifests.render_server("s", BATCHED.serving, labels={})
    assert manifests.render_server("s", EVERY_TRITON, labels={})["spec"]["serverConfig"] == "triton"


def test_hardware_with_too_little_memory_is_refused() -> None:
    with pytest.raises(InputError, match=r"gives 512Mi of memory.* need 573Mi"):
        manifests.render_server(
            "s", EVERY_TRITON, labels={}, memory_bytes=600_000_000, hardware=Hardware(memory="512Mi")
        )


# --- sizing ----------------------------------------------------------------------------------------------------


@given(st.floats(0.1, 1e6), st.floats(0.1, 1e6), st.floats(0.1, 0.2))
def test_replicas_suffice_and_one_fewer_does_not(rate: float, saturation: float, margin: float) -> None:
    found = sizing.replicas_for(rate, saturation, margin)
    each = sizing.rate_per_replica(saturation, margin)
    assert found * each >= rate * (1 - 1e-12)
    assert (found - 1) * each < rate


@pytest.mark.parametrize(
    "given",
    [(0.0, 10.0, 0.15), (math.nan, 10.0, 0.15), (1.0, 0.0, 0.15), (1.0, math.inf, 0.15), (1.0, 1.0, 0.3)],
)
def test_replicas_of_nonsense_are_refused(given: tuple[float, float, float]) -> None:
    with pytest.raises(InputError):
        sizing.replicas_for(*given)


@pytest.mark.parametrize(
    ("quantity", "size"), [("512Mi", 512 << 20), ("1.5Gi", 3 << 29), ("2G", 2e9), ("7", 7), ("3k", 3000), ("1Ki", 1024)]
)
def test_quantities_are_read_as_kubernetes_does(quantity: str, size: float) -> None:
    assert sizing.quantity_bytes(quantity) == size


@pytest.mark.parametrize("peak", [0.0, -1.0, math.nan, math.inf])
def test_memory_that_cannot_be_is_refused(peak: float) -> None:
    with pytest.raises(InputError):
        sizing.memory_needed(peak)


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Digits", "a_b", "a.b", "-a", "a-", "", "a" * 64, "a\n", "é"])
def test_names_that_core_2_refuses(name: str) -> None:
    with pytest.raises(InputError, match="Core 2 takes no Model"):
        model(name)


@pytest.mark.parametrize(
    "uri",
    [
        "mlflow-artifacts:/1/a",
        "runs:/a/m",
        "models:/m/1",
        "file:///m",
        "https://h/m",
        "relative/path",
        "",
        "s3:",
        "s3://a b",
    ],
)
def test_uris_that_rclone_cannot_fetch(uri: str) -> None:
    with pytest.raises(InputError, match="storageUri: "):
        model(storage_uri=uri)


@pytest.mark.parametrize("uri", ["s3://b/m", "gs://b/m", "minio:b/m", "/mnt/models/m"])
def test_uris_that_rclone_fetches(uri: str) -> None:
    assert model(storage_uri=uri)["spec"]["storageUri"] == uri


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weights": {"a": 1}, "default": "b"}, "none of the candidates"),
        ({"weights": {"a": 1}, "mirror": ("a", 10)}, "named twice"),
        ({"weights": {"a": 0, "b": 0}}, "weights are all 0"),
        ({"weights": {"a": -1}}, "weight"),
        ({"weights": {"a": 1}, "mirror": ("b", 101)}, "percent"),
        ({"weights": {}}, "candidates"),
        ({"weights": {"a.b": 1}}, "name"),
    ],
)
def test_experiments_that_core_2_refuses(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        manifests.render_experiment("x", labels={}, **given)


@pytest.mark.parametrize("steps", [[], ["a", "a"]])
def test_pipelines_without_steps_or_with_one_twice(steps: list[str]) -> None:
    with pytest.raises(InputError, match="steps"):
        manifests.render_pipeline("p", steps, labels={})


def test_a_chain_feeds_each_model_by_the_one_before() -> None:
    made = manifests.render_pipeline("p", ["tokenize", "embed"], labels={})["spec"]
    assert made["steps"] == [{"name": "tokenize"}, {"name": "embed", "inputs": ["tokenize"]}]
    assert made["output"] == {"steps": ["embed"]}


@pytest.mark.parametrize(("least", "most"), [(2, None), (None, 0), (3, 5)])
def test_replicas_outside_of_their_bounds(least: int | None, most: int | None) -> None:
    with pytest.raises(InputError):
        model(replicas=1, min_replicas=least, max_replicas=most)


@pytest.mark.parametrize("rate", [0.0, 0.0001, math.nan, math.inf])
def test_an_autoscaler_without_a_rate(rate: float) -> None:
    with pytest.raises(InputError):
        manifests.render_autoscaler("m", rate_rps=rate, min_replicas=1, max_replicas=2, labels={})


@pytest.mark.parametrize(
    "make",
    [
        lambda: model(clean_topics=True, version="2.6"),
        lambda: manifests.render_server("s", EVERY_TRITON, labels={}, delete_volumes=True, version="2.6"),
        lambda: manifests.render_autoscaler(
            "m", rate_rps=1, min_replicas=1, max_replicas=2, labels={}, version="2.6"
        ),
    ],
)  # fmt: skip
def test_what_came_later_is_refused_for_2_6(make: Any) -> None:
    with pytest.raises(InputError, match=r"came after Core 2 2\.6"):
        make()


@pytest.mark.parametrize("name", [name for name in EVERY if name != "autoscaler"])
def test_all_else_is_in_2_6_too(name: str) -> None:
    schema.check_manifest(EVERY[name], "2.6")


@pytest.mark.parametrize("key", ["dedicated", "preloaded", "schemaUri", "scaling", "resources"])
def test_fields_that_have_no_effect_are_unknown(key: str) -> None:
    made = model()
    with pytest.raises(InputError, match=f"Model digits: Model.spec.{key}"):
        schema.check_manifest({**made, "spec": {**made["spec"], key: True}})


def test_a_foreign_kind_is_refused() -> None:
    with pytest.raises(InputError, match="Deployment"):
        schema.check_manifest({"kind": "Deployment"})


# --- ServerConfig ----------------------------------------------------------------------------------------------


def test_an_installed_server_config_is_kept_but_for_what_was_asked() -> None:
    made = manifests.render_server_config("t", INSTALLED, labels={}, server="triton", quiet=False)
    assert made["spec"] == INSTALLED["spec"]
    enough = manifests.render_server_config("t", INSTALLED, labels={}, server="triton", models_bytes=1 << 29)
    assert enough["spec"]["volumeClaimTemplates"] == INSTALLED["spec"]["volumeClaimTemplates"]


@pytest.mark.parametrize(
    "installed",
    [
        {},
        {"kind": "Server", "spec": INSTALLED["spec"]},
        {"kind": "ServerConfig"},
        {"kind": "ServerConfig", "spec": 3},
        {"kind": "ServerConfig", "spec": {"podSpec": {"containers": [{"name": "mlserver"}, "x"]}}},
        {"kind": "ServerConfig", "spec": {"podSpec": {"containers": [{"name": "triton"}]}}},
        {
            "kind": "ServerConfig",
            "spec": {
                "podSpec": {
                    "containers": [{"name": "triton"}, {"name": "agent", "volumeMounts": [{"mountPath": 3}, 4]}]
                },
                "volumeClaimTemplates": [7],
            },
        },
    ],
)
def test_what_is_no_server_config_is_refused(installed: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="installed"):
        manifests.render_server_config("t", installed, labels={}, server="triton", models_bytes=1 << 30)


# --- the folder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "paths"),
    [("mlserver", {"model-settings.json", "model.onnx"}), ("triton", {"config.pbtxt", "1/model.py", "1/model.onnx"})],
)
def test_a_folder_is_laid_out_as_its_server_looks_for_it(tmp_path: Path, server: str, paths: set[str]) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "model.onnx").write_bytes(b"abc")
    folder = model_folder(candidate(server=server), artifact(), model_name="m")
    write_folder(folder, tmp_path / "from", tmp_path / "to")
    assert {str(path.relative_to(tmp_path / "to")) for path in (tmp_path / "to").rglob("*") if path.is_file()} == paths


def test_another_setting_or_other_bytes_is_another_digest() -> None:
    first = model_folder(candidate(), artifact(), model_name="m")
    assert model_folder(candidate(threads=2), artifact(), model_name="m").digest != first.digest
    assert model_folder(candidate(), artifact("model.onnx", "w.bin"), model_name="m").digest != first.digest
    other = ArtifactFile(path="model.onnx", sha256="1" * 64, size_bytes=3)
    trained_again = dataclasses.replace(artifact(), files=(other,))
    assert model_folder(candidate(), trained_again, model_name="m").digest != first.digest
    assert model_folder(candidate(), artifact(), model_name="m").digest == first.digest


def test_a_models_own_file_does_not_stand_in_for_a_rendered_one() -> None:
    with pytest.raises(InputError, match=r"'model-settings\.json' of its own"):
        model_folder(candidate(), artifact("model.onnx", "model-settings.json"), model_name="m")
