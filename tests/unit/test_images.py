"""What the Dockerfile and its constraints promise, and the stand-in for an engine that builds it."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from profiles.serving.mlserver import ENVIRONMENT
from tests.doubles.image_builder import Builder, Image, Stage, ancestry, parse

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("serve", "job-cpu", "job-gpu")
# What the builds for CUDA bring with them, and cuDNN.
CUDA = re.compile(r"nvidia-(?!pytriton|ml-py)|cuda-|triton$")


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    return parse((ROOT / "Dockerfile").read_text(encoding="utf-8"))


def last(stages: dict[str, Stage], target: str, instruction: str) -> tuple[str, ...] | None:
    found = [one.words for stage in ancestry(stages, target) for one in stage.of(instruction)]
    return found[-1] if found else None


def environment(stages: dict[str, Stage], target: str) -> dict[str, str]:
    words = [word for stage in ancestry(stages, target) for one in stage.of("ENV") for word in one.words]
    return dict(zip(words[::2], words[1::2], strict=True))


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(one.name): next(iter(one.specifier)).version for one in found}


# --- the Dockerfile ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_runs_as_a_user_by_number_who_is_not_root(stages: dict[str, Stage], target: str):
    # Kubernetes cannot tell of a name whether it is root's.
    assert last(stages, target, "USER") == ("1000",)


def test_base_images_are_pinned_to_a_patch_version_and_a_digest(stages: dict[str, Stage]):
    bases = {stage.base for stage in stages.values()} - set(stages)
    assert bases
    assert all(re.fullmatch(r"[\w/.-]+:\d+\.\d+\.\d+[\w.-]*@sha256:[0-9a-f]{64}", base) for base in bases)


def test_what_is_installed_is_pinned(stages: dict[str, Stage]):
    runs = [one.words[0] for stage in stages.values() for one in stage.of("RUN")]
    installs = [shlex.split(part) for run in runs for part in run.split("&&") if "pip install" in part]
    assert len(installs) == 5
    for words in installs:
        exact = all("==" in word for word in words[2:])
        own = words[-1] == "." and "--no-deps" in words
        pinned = ("-c", "constraints.txt") in pairwise(words)
        whole = ("-r", "constraints-gpu.txt") in pairwise(words) and "--no-deps" in words
        assert exact or own or pinned or whole, shlex.join(words)
        # What builds our own package is pinned too.
        assert "--build-constraint" in words or not any(word.startswith(".") for word in words), shlex.join(words)


def test_what_is_copied_is_in_the_build_context(stages: dict[str, Stage]):
    sources = [
        source
        for stage in stages.values()
        for one in stage.of("COPY")
        if "from" not in one.flags
        for source in one.words[:-1]
    ]
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {source.partition("/")[0] for source in sources} == {rule[1:] for rule in rules if rule.startswith("!")}
    assert all((ROOT / source).exists() for source in sources)


def test_serve_starts_mlserver_on_the_folder_that_core2_names(stages: dict[str, Stage]):
    assert last(stages, "serve", "ENTRYPOINT") is None
    assert last(stages, "serve", "CMD") == ("sh", "-c", 'exec mlserver start "$MLSERVER_MODELS_DIR"')
    assert environment(stages, "serve").items() >= ENVIRONMENT.items()


def test_serve_holds_the_session_and_no_other_room(stages: dict[str, Stage]):
    copied = [one.words[:-1] for stage in ancestry(stages, "serve") for one in stage.of("COPY")]
    assert copied == [("/opt/venv",), ("profiles/__init__.py",), ("profiles/serving",)]


@pytest.mark.parametrize("target", ["job-cpu", "job-gpu"])
def test_a_job_starts_burnish(stages: dict[str, Stage], target: str):
    assert last(stages, target, "ENTRYPOINT") == ("burnish",)


# --- what they install -------------------------------------------------------------------------------------------


def test_serve_asks_for_what_the_extras_ask_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    offered = {*project["project"]["dependencies"], *extras["mlserver"], *extras["openvino"]}
    group = set(project["dependency-groups"]["serve"])
    assert group <= offered
    assert group >= set(extras["mlserver"])


def test_the_constraints_for_gpus_agree_with_the_others():
    cpu, gpu = pins("constraints.txt"), pins("constraints-gpu.txt")
    assert {name: gpu[name] for name in gpu if name in cpu} == {name: cpu[name] for name in gpu if name in cpu}
    assert gpu["onnxruntime-gpu"] == cpu["onnxruntime"]
    assert "onnxruntime" not in gpu


def test_the_constraints_for_gpus_list_all_that_burnish_needs_and_nothing_more():
    needed = set(required("burnish", {"all"})) - {"onnxruntime"}
    listed = {name for name in pins("constraints-gpu.txt") if not CUDA.match(name)} - {"onnxruntime-gpu"}
    assert needed - listed == set(), "add to constraints-gpu.txt what constraints.txt has of these"
    assert listed - needed == set(), "take from constraints-gpu.txt"


def required(name: str, extras: set[str], found: set[str] | None = None) -> Iterator[str]:
    """The packages that a package requires here, with all that they require."""
    found = set() if found is None else found
    try:
        requirements = [Requirement(text) for text in distribution(name).requires or ()]
    except PackageNotFoundError:
        return
    for one in requirements:
        if one.marker and not any(one.marker.evaluate({"extra": extra}) for extra in (extras or {""})):
            continue
        package, asked = canonicalize_name(one.name), ",".join(sorted(one.extras))
        if package != name:
            yield package
        if f"{package}[{asked}]" not in found:
            found.add(f"{package}[{asked}]")
            yield from required(package, set(one.extras), found)


# --- the stand-in for an engine ----------------------------------------------------------------------------------

SMALL = """
FROM somewhere:1.0.0 AS base
RUN useradd someone && python -c "open('made', 'w').write('by python')"
ENV PATH=/opt/venv/bin:$PATH PLACE=/opt/place
WORKDIR /opt/place
FROM base AS made
ARG WORD=hello
COPY context/one context/two ./
COPY context copied
RUN python -c "import os; open('said', 'w').write(os.environ['WORD'])"
FROM base AS target
COPY --from=made /opt/place /opt/taken
USER 7
ENTRYPOINT ["/opt/venv/bin/run"]
CMD ["--folder", "/opt/place"]
"""


@pytest.fixture
def context(tmp_path: Path) -> Path:
    folder = tmp_path / "context"
    (folder / "__pycache__").mkdir(parents=True)
    (folder / "one").write_text("1")
    (folder / "two").write_text("2")
    return tmp_path


def build(context: Path, text: str, **arguments: str) -> tuple[Image, list[str]]:
    work, said = context / "work", []
    work.mkdir()
    builder = Builder(parse(text), context=context, work=work, build_arguments=arguments, say=said.append)
    return builder.build("target"), said


def test_a_stage_has_what_it_copies_and_what_it_starts_from_has(context: Path):
    image, said = build(context, SMALL)
    assert (image.root / "opt/taken/one").read_text() == "1"
    assert sorted(path.name for path in (image.root / "opt/taken/copied").iterdir()) == ["one", "two"]
    assert (image.root / "opt/taken/said").read_text() == "hello"
    assert (image.root / "made").read_text() == "by python"
    assert list((image.root / "opt/place").iterdir()) == []
    assert image.left_out == ("useradd someone",)
    assert "  left out  useradd someone" in said


def test_build_arguments_stand_for_what_the_dockerfile_says(context: Path):
    image, _ = build(context, SMALL, WORD="other")
    assert (image.root / "opt/taken/said").read_text() == "other"


def test_an_image_is_started_with_paths_of_this_host(context: Path):
    image, _ = build(context, SMALL)
    root = str(image.root)
    assert image.user == "7"
    assert image.command() == [f"{root}/opt/venv/bin/run", "--folder", f"{root}/opt/place"]
    assert image.command("doctor") == [f"{root}/opt/venv/bin/run", "doctor"]
    assert image.process_environment({"MORE": "/mnt/x"}) == {
        "PATH": f"{root}/opt/venv/bin:/usr/local/bin:/usr/bin:/bin",
        "PLACE": f"{root}/opt/place",
        "MORE": f"{root}/mnt/x",
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("FROM somewhere:1.0.0\n", "does not name its stage"),
        ("ARG x\nFROM somewhere:1.0.0 AS target\n", "before the first stage"),
        ("FROM somewhere:1.0.0 AS target\nRUN curl http://x\n", "cannot run 'curl'"),
        ("FROM somewhere:1.0.0 AS target\nVOLUME /x\n", "does not know VOLUME"),
        ("FROM somewhere:1.0.0 AS target\nRUN python -c 'exit(3)'\n", "ended with 3"),
    ],
)
def test_what_the_stand_in_cannot_do_it_refuses(context: Path, text: str, reason: str):
    with pytest.raises(ValueError, match=reason):
        build(context, text)
