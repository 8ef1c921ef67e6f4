"""What is installed is what runs: the wheel holds the packages, their files, and the demo."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    # Built from a copy: setuptools leaves its work beside what it builds, and takes what it left there the last time.
    for name in ("optimize", "profiles", "registry"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-cache-dir", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(folder), str(source)], check=True)
    return next(folder.glob("burnish-*.whl"))


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"optimize", "profiles", "registry", next(top for top in tops if top.endswith(".dist-info"))}
    assert {"optimize/demo/campaign.yaml", "profiles/library/levels.yaml", "registry/report/page.html"} <= set(names)
    assert not [name for name in names if "test_" in name or name.endswith(".npz")]


def test_the_demo_is_planned_from_an_installed_wheel(wheel: Path, tmp_path: Path):
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    code = (
        "import optimize; from pathlib import Path; from optimize.config import load_campaign; "
        "from optimize.demo.prepare import prepare_demo; from optimize.plan import plan; "
        "file = prepare_demo(Path('demo')); "
        "planned = plan(load_campaign(file), base=file.parent, work=Path('work')); "
        "print(Path(optimize.__file__).parent.parent, len(planned.recipes))"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], check=False, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    where, recipes = done.stdout.split()
    assert Path(where) == site
    assert int(recipes) == 7
