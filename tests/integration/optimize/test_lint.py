"""``burnish lint`` from end to end: exit codes, one JSON document, and files that nobody has vouched for."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from optimize.cli import main
from optimize.testing import tiny_conv_net
from tests.doubles.models import mlp, write_onnx

DATA = Path(__file__).parents[2] / "data"

pytestmark = pytest.mark.slow


@pytest.fixture
def lint(monkeypatch, capsys):
    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["burnish", "lint", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, capsys.readouterr().out

    return run


def by_rule(document: str) -> dict[str, dict]:
    return {finding["rule"]: finding for finding in json.loads(document)["findings"]}


@pytest.mark.parametrize("version", ["10", "11"])
def test_what_nvidias_own_tool_quantized_passes(lint, version) -> None:
    shapes = "image=1x3x16x16,8x3x16x16,16x3x16x16"
    model = DATA / "modelopt-int8-float16.onnx"
    code, told = lint(model, "--tensorrt", version, "--precision", "int8", "--shapes", shapes, "--json")
    assert (code, json.loads(told)["findings"]) == (0, [])


@pytest.mark.parametrize("version", ["10", "11"])
@pytest.mark.parametrize(("activations", "rules"), [(None, {"E401", "E403"}), ("QUInt8", {"E401", "E402", "E403"})])
def test_what_onnx_runtime_quantizes_by_default_fails(lint, version, activations, rules, tmp_path: Path) -> None:
    """Its defaults are asymmetric, and biases int32; activations of uint8 are its advice for CPUs."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            random = np.random.default_rng(0)
            self.left = [{"image": random.standard_normal((1, 3, 8, 8), dtype=np.float32)} for _ in range(4)]

        def get_next(self) -> dict | None:
            return self.left.pop() if self.left else None

    source = tiny_conv_net(tmp_path / "source")
    chosen = {"activation_type": QuantType[activations]} if activations else {}
    quantize_static(str(source.path), str(tmp_path / "qdq.onnx"), Reader(), **chosen)
    code, told = lint(tmp_path / "qdq.onnx", "--tensorrt", version, "--json")
    found = by_rule(told)
    assert code == 5
    assert {rule for rule, finding in found.items() if finding["severity"] == "error"} == rules
    assert all(found[rule]["nodes"] for rule in rules)


def test_people_read_the_node_and_the_fix(lint, tmp_path: Path) -> None:
    write_onnx(mlp(dtype="float16"), tmp_path)
    code, told = lint(tmp_path / "model.onnx", "--tensorrt", "11")
    assert code == 0
    assert "E307 warning clients must send and take float16: x, logits" in told
    assert "fix Convert with keep_io_types" in told
    assert told.endswith("0 errors, 2 warnings, 0 remarks\n")


def test_both_targets_at_once(lint, tmp_path: Path) -> None:
    write_onnx(mlp(), tmp_path)
    code, told = lint(tmp_path / "model.onnx", "--tensorrt", "10", "--triton", "23.03", "--json")
    assert code == 5
    assert set(by_rule(told)) == {"E501", "T102"}


def test_a_damaged_model_is_the_users_input(lint, tmp_path: Path) -> None:
    whole = (DATA / "modelopt-int8-float16.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    code, told = lint(tmp_path / "cut.onnx", "--tensorrt", "10", "--json")
    assert code == 2
    assert json.loads(told)["error"]["message"]


def test_every_bit_that_is_flipped_is_a_finding_or_a_refusal(tmp_path: Path) -> None:
    """In this process, where a crash would be seen; the command does it in a child."""
    from optimize.readiness.lint import lint_here
    from registry.errors import InputError

    whole = bytearray((DATA / "modelopt-int8-float16.onnx").read_bytes())
    random, path = np.random.default_rng(0), tmp_path / "flipped.onnx"
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[random.integers(len(whole))] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        try:
            found = lint_here(
                path=str(path), tensorrt="11", triton="23.03", shapes=[], precision=None, max_batch_size=None
            )
        except InputError:
            continue
        assert isinstance(found, list)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "nothing to check for"),
        (("--tensorrt", "8"), "TensorRT '8'"),
        (("--triton", "20.01"), "Triton '20.01'"),
        (("--tensorrt", "10", "--precision", "int7"), "no precision 'int7'"),
        (("--tensorrt", "10", "--shapes", "x=1"), "'x=1' gives no shapes"),
        (("--triton", "23.03", "--server", "triton"), "are for Core 2"),
    ],
)
def test_what_cannot_be_asked_for_is_said(lint, arguments, said, tmp_path: Path) -> None:
    write_onnx(mlp(), tmp_path)
    code, told = lint(tmp_path / "model.onnx", *arguments, "--json")
    assert code == 2
    assert said in json.loads(told)["error"]["message"]
