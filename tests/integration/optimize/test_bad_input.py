"""Bad input to a whole campaign: each a clear message or a recorded failure, and nothing half written is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from optimize.engines.local import ChildFailure, Limits, run_in_child
from optimize.sources import load_huggingface, load_onnx
from optimize.stages.base import read_input
from optimize.testing import run_model, samples_for, tiny_conv_net
from registry.errors import InputError, NotApplicableError, StageError, UntrustedModelError
from registry.store import FolderStore
from tests.doubles import zoo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # campaigns wait for each other's cores
HERE = Path(__file__).parent

STAGES = '''
"""Stages that fail in every way there is."""

import os
import signal
import time

import onnx
from onnx import numpy_helper

from optimize.stages import onnx_files
from optimize.stages.base import Stage


class Killed(Stage):
    name = "bad.killed"
    tools = ("onnx",)

    def apply(self, source, context):
        whole = source.path.read_bytes()
        (context.out / "model.onnx").write_bytes(whole[: len(whole) // 2])
        os.kill(os.getpid(), signal.SIGKILL)


class Raising(Killed):
    name = "bad.raising"

    def apply(self, source, context):
        (context.out / "model.onnx").write_bytes(b"half")
        raise KeyError("weights")


class Eating(Killed):
    name = "bad.eating"

    def apply(self, source, context):
        (context.out / "model.onnx").write_bytes(b"half")
        held = [bytearray(os.urandom(1000) * 100_000) for _ in range(12)]
        # More than the limit, and no more than the machine has, however late it is noticed.
        time.sleep(600)


class Lying(Killed):
    name = "bad.lying"

    def apply(self, source, context):
        (context.out / "model.onnx").write_bytes(source.path.read_bytes()[:100])
        return self.written(context, "model.onnx")


class Spoiling(Killed):
    name = "bad.spoiling"

    def apply(self, source, context):
        model = onnx.load(str(source.path))
        for tensor in model.graph.initializer:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * float("nan"), tensor.name))
        return self.written(context, onnx_files.save(model, context.out))
'''
WAYS = ("killed", "raising", "eating", "lying", "spoiling")
CAMPAIGN = """
name: bad
sources: [{onnx: source/model.onnx}]
samples: {evaluation: held-out.npz}
variants: [float32, %s, {name: good, stages: [simplify.ort]}]
limits: {memory_mb: 900}
level: quick
"""
METRIC = "def mine(outputs, labels):\n    raise LookupError('no such label')\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A campaign, with a plug-in of stages and a metric beside it."""
    model = tiny_conv_net(tmp_path / "source")
    images = samples_for(model.inputs, count=40)
    np.savez(tmp_path / "held-out.npz", labels=run_model(model, images)[0].argmax(axis=1), **images)
    variants = ", ".join(f"{{name: {way}, stages: [bad.{way}]}}" for way in WAYS)
    (tmp_path / "campaign.yaml").write_text(CAMPAIGN % variants)
    (tmp_path / "bad_metric.py").write_text(METRIC)
    plugin = tmp_path / "plugin" / "bad_stages-1.0.dist-info"
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-stages\nVersion: 1.0\n")
    entries = "".join(f"bad.{way} = bad_stages:{way.title()}\n" for way in WAYS)
    (plugin / "entry_points.txt").write_text(f"[burnish.stages]\n{entries}")
    (tmp_path / "plugin" / "bad_stages.py").write_text(STAGES)
    return tmp_path


def burnish(folder: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-P", "-m", "optimize", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(folder / "plugin")}
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )


def test_stages_that_fail_are_records_and_the_campaign_goes_on(folder: Path) -> None:
    done = burnish(folder, "make", "campaign.yaml", "--judge", "--json", "--out", folder / "variants")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [one["name"] for one in document["judged"]] == ["float32", "good"]
    failures = {one["subject"].split("@")[0].split(" ")[0]: one for one in document["failures"]}
    told = {name: (one["kind"], one["reason"]) for name, one in failures.items()}
    for name, kind, reason in (
        ("killed", "died", "was killed by SIGKILL"),
        ("raising", "error", "bad.raising failed with KeyError: 'weights'"),
        ("eating", "memory", "memory"),
        ("lying", "error", "bad.lying wrote what cannot be read"),
        ("spoiling", "error", "gives NaN"),
    ):
        assert told[name][0] == kind, told
        assert reason in told[name][1], told
    check_stored(folder)


def check_stored(folder: Path) -> None:
    """Whatever is in the store is whole, and nothing is left of work that was stopped."""
    (store,) = folder.rglob("artifacts")
    assert not list((store / ".incoming").iterdir())
    kept = [path for path in store.iterdir() if path.is_dir() and path.name != ".incoming"]
    assert len(kept) >= 2
    for path in kept:
        assert path.with_suffix(".json").is_file()
        onnx.checker.check_model(str(path / "model.onnx"))
        read_input(path, "model.onnx")
    assert not [path for path in (store.parent / "tmp").rglob("*") if path.is_file()]


def test_a_metric_that_raises_is_the_users_error(folder: Path) -> None:
    text = (folder / "campaign.yaml").read_text().replace("level:", "metric: bad_metric:mine\nlevel:")
    (folder / "campaign.yaml").write_text(text)
    done = burnish(folder, "make", "campaign.yaml", "--judge", "--json", "--out", folder / "variants")
    assert done.returncode == 2, done.stderr
    error = json.loads(done.stdout)["error"]
    assert "LookupError" in error["message"]
    assert "no such label" in error["message"]


# --- models -----------------------------------------------------------------------------------------------------


def test_damaged_models_are_refused_or_harmless(tmp_path: Path) -> None:
    for kind in ("detector", "if", "lstm", "constant-nodes", "local-functions"):
        zoo.write(kind, tmp_path / kind)
    found = run_in_child(
        "damage:try_damaged",
        {"folder": str(tmp_path), "count": 200, "seed": 11},
        python_path=HERE,
        limits=Limits(timeout_s=240, memory_mb=1500),
    )
    assert found["refused"] + found["admitted"] == 200
    assert found["refused"] > 20
    assert found["without_reason"] == []


FOLDED = {
    "ConstantOfShape": ("int64[1] s = {2000000000}", "big = ConstantOfShape (s)"),
    "Expand": ("int64[1] s = {2000000000}, float one = {1.0}", "big = Expand (one, s)"),
}


@pytest.mark.parametrize("operator", FOLDED)
def test_a_constant_that_unfolds_to_gigabytes_is_a_recorded_failure(operator: str, tmp_path: Path) -> None:
    constants, node = FOLDED[operator]
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[b,4] x) => (float[b,4] y) <{constants}> '
        f"{{ {node} m = ReduceMax <keepdims = 0> (big) y = Add (x, m) }}"
    )
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert (tmp_path / "model.onnx").stat().st_size < 1000
    with pytest.raises((ChildFailure, NotApplicableError)) as caught:
        run_in_child(
            "damage:convert_to_openvino",
            {"folder": str(tmp_path)},
            python_path=HERE,
            limits=Limits(timeout_s=240, memory_mb=700),
        )
    assert not isinstance(caught.value, ChildFailure) or caught.value.kind == "memory"


def payload(sentinel: Path, protocol: int) -> bytes:
    """A pickle that, once read, leaves a file: it calls ``os.system``."""
    begin = b"" if protocol == 0 else bytes([0x80, protocol])
    return begin + f"cos\nsystem\n(S'touch {sentinel}'\ntR.".encode()


@pytest.mark.parametrize("name", ["model.onnx", "model.pt", "model.bin", "model.joblib"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_is_never_read(name: str, protocol: int, tmp_path: Path) -> None:
    sentinel = tmp_path / "it-ran"
    (tmp_path / name).write_bytes(payload(sentinel, protocol))
    with pytest.raises(InputError, match="not an ONNX model"):
        load_onnx("m", tmp_path / name, FolderStore(tmp_path / "store"), tmp_path / "work")
    assert not sentinel.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_pickle_that_the_user_allows_is_read_without_running_it(tmp_path: Path) -> None:
    pytest.importorskip("optimum.exporters.onnx", reason="the extra hf is not installed")
    folder, sentinel = tmp_path / "bert", tmp_path / "it-ran"
    folder.mkdir()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 9, **sizes}))
    (folder / "pytorch_model.bin").write_bytes(payload(sentinel, 2))
    store = FolderStore(tmp_path / "store")
    with pytest.raises(UntrustedModelError, match="a pickle; burnish unpickles nothing"):
        load_huggingface("m", folder, store, tmp_path / "work")
    with pytest.raises(UntrustedModelError, match="holds more than weights"):
        load_huggingface("m", folder, store, tmp_path / "work", allow_pickle=True)
    assert not sentinel.exists()
    assert not list((tmp_path / "work").iterdir())


def test_weights_that_are_no_numbers_are_told_of(tmp_path: Path) -> None:
    path = zoo.write("perceptron", tmp_path / "given")
    model = onnx.load(str(path))
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((8, 16), np.nan, np.float32), "w1"))
    path.write_bytes(model.SerializeToString())
    np.savez(tmp_path / "s.npz", x=np.ones((9, 8), np.float32), labels=np.zeros(9, np.int64))
    with pytest.raises(StageError, match="gives NaN in the output 'y'"):
        run_in_child(
            "optimize.fidelity:evaluate",
            {
                "entry": str(path), "engine": {"name": "onnxruntime", "precision": "default", "graph_level": "all"},
                "samples": str(tmp_path / "s.npz"), "out": str(tmp_path / "out.npz"), "batch_size": 4, "threads": 1,
                "seed": 0, "metric": "accuracy",
            },
        )  # fmt: skip
    assert not (tmp_path / "out.npz").exists()
