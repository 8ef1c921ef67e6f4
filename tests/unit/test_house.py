"""Rules of the house that no linter holds."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from registry import errors, records

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("optimize", "profiles", "registry")


def record_types() -> list[type]:
    return [value for value in vars(records).values() if isinstance(value, type) and dataclasses.is_dataclass(value)]


@pytest.mark.parametrize("record", record_types(), ids=lambda record: record.__name__)
def test_records_are_frozen_keyword_only_and_slotted(record: type):
    assert record.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(record))
    assert "__slots__" in vars(record)


def test_errors_have_the_exit_codes_of_their_tree():
    codes = {
        value.__name__: value.exit_code
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.BurnishError)
    }
    assert codes["InputError"] == codes["PolicyError"] == codes["DocumentError"] == 2
    assert codes["NoVariantError"] == 3
    assert codes["UnreachableError"] == codes["ServerDiedError"] == 4
    assert codes["CheckFailedError"] == 5


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("registry.records, registry.codec, registry.ports", "mlflow onnxruntime torch numpy grpc"),
        ("optimize.cli.app", "pydantic rich numpy mlflow onnx onnxruntime torch grpc"),
        ("optimize.config", "mlflow onnx onnxruntime torch grpc"),
        ("profiles.serving.session", "mlflow onnxruntime openvino torch mlserver pydantic"),
    ],
)
def test_light_modules_stay_light(modules: str, heavy: str):
    code = f"import sys, {modules}; sys.exit(' '.join(m for m in {heavy.split()!r} if m in sys.modules) or None)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], check=False, capture_output=True, text=True, cwd=ROOT.parent
    )
    assert done.returncode == 0, f"{modules} import {done.stderr.strip()}"


def sources() -> list[Path]:
    folders = (*PACKAGES, "tests", "benchmarks", "examples", "docs")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    kept = [
        path
        for path in found
        if path.suffix in {".py", ".md", ".yaml"} and not any(part.startswith("burnish-work") for part in path.parts)
    ]
    return [*kept, ROOT / "README.md", ROOT / "Makefile", ROOT / "pyproject.toml"]


def test_nothing_speaks_of_one_machine_or_of_what_is_not_shipped():
    here = Path(__file__)
    words = re.compile(r"/work/|/root/|\bshared/|issue \d|\bTODO\b|\bFIXME\b")
    allowed = re.compile(r"\.\./shared/(crds|wire)")
    for path in sources():
        if path == here:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            found = words.search(allowed.sub("", line))
            assert found is None, f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_every_relative_link_of_the_documents_leads_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"


def test_every_package_is_listed_for_the_wheel():
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for name in PACKAGES
        for path in (ROOT / name).rglob("__init__.py")
    }
    assert set(listed) == found
