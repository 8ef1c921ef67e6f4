import json
import sys
from pathlib import Path

import pytest

from optimize.cli import main
from tests.doubles import zoo
from tests.doubles.models import mlp, write_onnx

COMMANDS = (
    "demo",
    "init",
    "inspect",
    "make",
    "run",
    "status",
    "render",
    "serve",
    "bench",
    "check",
    "compare",
    "report",
    "explain",
    "select",
    "promote",
    "rollback",
    "history",
    "rebuild",
    "lint",
    "tensorrt",
    "doctor",
    "cache why",
    "job render",
    "job submit",
    "job status",
    "job logs",
    "job cancel",
    "pipeline check",
    "pipeline measure",
    "pipeline analyse",
    "pipeline choose",
    "pipeline balance",
    "pipeline size",
    "pipeline promote",
)


def burnish(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["burnish", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    code = caught.value.code
    assert isinstance(code, int)
    return code


def test_help_lists_every_command(monkeypatch, capsys):
    assert burnish(monkeypatch, "--help") == 0
    listed = capsys.readouterr().out
    assert all(command.split()[0] in listed for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(monkeypatch, capsys, command: str):
    assert burnish(monkeypatch, *command.split(), "--help") == 0
    # Lines are broken at the terminal's width.
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Example: burnish {command}" in shown
    assert "--json" in shown


def test_a_wrong_option_is_exit_2_and_json_on_stdout(monkeypatch, capsys):
    assert burnish(monkeypatch, "inspect", "--colour", "--json") == 2
    told = capsys.readouterr()
    error = json.loads(told.out)["error"]
    assert "--colour" in error["message"]
    assert set(error) == {"kind", "message", "hint"}


def test_an_error_for_people_goes_to_stderr(monkeypatch, capsys, tmp_path: Path):
    assert burnish(monkeypatch, "run", str(tmp_path / "none.yaml")) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "none.yaml" in told.err
    assert "Traceback" not in told.err


def test_init_writes_once(monkeypatch, capsys, tmp_path: Path):
    assert burnish(monkeypatch, "init", str(tmp_path / "new"), "--json") == 0
    written = Path(json.loads(capsys.readouterr().out)["campaign"])
    before = written.read_text()
    assert burnish(monkeypatch, "init", str(tmp_path / "new")) == 2
    assert written.read_text() == before


def test_inspect_shows_the_tensors(monkeypatch, capsys, tmp_path: Path):
    model = tmp_path / write_onnx(mlp(), tmp_path).entry
    assert burnish(monkeypatch, "inspect", str(model), "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert described["format"] == "onnx"
    assert described["inputs"][0]["dtype"] == "float32"
    assert described["parameters"] > 0


def test_inspect_says_which_weights_are_missing(monkeypatch, capsys, tmp_path: Path):
    model = zoo.write("external-data", tmp_path)
    (tmp_path / "weights.bin").unlink()
    assert burnish(monkeypatch, "inspect", str(model)) == 0
    assert "in weights.bin (missing)" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x80\x04\x95"])
def test_inspect_of_what_is_no_model(monkeypatch, capsys, tmp_path: Path, content: bytes):
    (tmp_path / "model.onnx").write_bytes(content)
    assert burnish(monkeypatch, "inspect", str(tmp_path / "model.onnx")) == 2
    assert "not an ONNX model" in capsys.readouterr().err


def test_a_level_that_is_none(monkeypatch, capsys, tmp_path: Path):
    (tmp_path / "campaign.yaml").write_text(
        "name: tiny\nsources: [{onnx: m.onnx}]\nsamples: {evaluation: e.npz}\nlevel: quick\n"
    )
    assert burnish(monkeypatch, "run", str(tmp_path / "campaign.yaml"), "--level", "best") == 2
    assert "best" in capsys.readouterr().err


def test_a_report_of_an_empty_folder(monkeypatch, capsys, tmp_path: Path):
    assert burnish(monkeypatch, "report", str(tmp_path), "--json") == 2
    assert "no finished campaign" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_doctor_says_what_the_host_has(monkeypatch, capsys):
    assert burnish(monkeypatch, "doctor", "--json") == 0
    findings = json.loads(capsys.readouterr().out)
    assert int(findings["host"]["cores"]) >= 1
    assert {"mlserver", "triton"} <= set(findings["servers"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("doctor", "--cluster", "gone.yaml"), "there is no file gone.yaml"),
        (("check", "127.0.0.1:1", "--model", "m", "--cluster", "gone.yaml"), "--cluster is for a candidate"),
        (("serve", "model.onnx", "--cluster", "gone.yaml"), "there is no file gone.yaml"),
        (("serve", "model.onnx", "--server", "triton", "--backend", "onnxruntime"), "has the python backend alone"),
    ],
)
def test_a_cluster_that_cannot_be(monkeypatch, capsys, tmp_path: Path, arguments: tuple[str, ...], words: str):
    monkeypatch.chdir(tmp_path)
    write_onnx(mlp(), tmp_path)
    assert burnish(monkeypatch, *arguments, "--json") == 2
    assert words in json.loads(capsys.readouterr().out)["error"]["message"]


def test_a_namesake_of_a_package_is_refused(monkeypatch, capsys, tmp_path: Path):
    import profiles

    monkeypatch.setattr(profiles, "__path__", [str(tmp_path / "profiles")])
    assert burnish(monkeypatch, "--help") == 2
    assert "different places" in capsys.readouterr().err


def test_cache_why_has_help_with_an_example(monkeypatch, capsys):
    assert burnish(monkeypatch, "cache", "why", "--help") == 0
    assert "Example: burnish cache why" in capsys.readouterr().out


def test_cache_why_without_a_campaign(monkeypatch, capsys, tmp_path: Path):
    assert burnish(monkeypatch, "cache", "why", "float32", "--work", str(tmp_path / "work"), "--json") == 2
    assert "campaign.yaml" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_explain_of_files_needs_samples(monkeypatch, capsys, tmp_path: Path):
    model = str(tmp_path / write_onnx(mlp(), tmp_path).entry)
    assert burnish(monkeypatch, "explain", model, "--against", model) == 2
    assert "--samples" in capsys.readouterr().err


def test_explain_without_a_campaign(monkeypatch, capsys, tmp_path: Path):
    assert burnish(monkeypatch, "explain", "int8-static", "--work", str(tmp_path)) == 2
    assert "no finished campaign" in capsys.readouterr().err


@pytest.mark.parametrize("command", [("init",), ("demo", "--work"), ("make", "model.onnx", "--out")], ids=" ".join)
def test_a_file_where_a_folder_is_to_be_is_told_before_any_work(monkeypatch, capsys, tmp_path: Path, command):
    write_onnx(mlp(), tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    for place in ("file", "file/below"):
        assert burnish(monkeypatch, *command, place) == 2
        assert f"{place} cannot be made" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model.onnx"]
