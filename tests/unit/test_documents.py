"""What the documents show works: commands have the options that are given, and campaign files are taken."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel, ConfigDict

from optimize.cli.app import app
from optimize.config import CampaignConfig
from registry.documents import parse_document
from registry.policy import parse_policy

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*/README.md")])
COMMAND: Any = typer.main.get_command(app)
# What a campaign file must have, for examples that show only what they are about.
LEAST = {"name": "net", "sources": [{"onnx": "net.onnx"}], "samples": {"evaluation": "evaluation.npz"}}


class Anything(BaseModel):
    model_config = ConfigDict(extra="allow")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands_in(text: str) -> Iterator[list[str]]:
    """The words of each command that a document shows, continued lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        for found in re.finditer(r"(?:^|[`\s(/])burnish ([a-z][^`#|]*)", line):
            yield found[1].split()


def options_of(words: list[str]) -> tuple[set[str], list[str]] | None:
    """The options that a command takes, and the words after its name; None where the first word is no command."""
    command = COMMAND
    rest = list(words)
    while hasattr(command, "commands"):
        if not rest or rest[0] not in command.commands:
            return None
        command = command.commands[rest.pop(0)]
    return {option for one in command.params for option in (*one.opts, *one.secondary_opts)} | {"--help"}, rest


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_a_document_gives_commands_the_options_that_they_have(path: Path):
    for words in commands_in(path.read_text(encoding="utf-8")):
        known = options_of(words)
        if known is not None:
            given = {word.partition("=")[0].rstrip(".,;:)") for word in known[1] if word.startswith("--")}
            assert given <= known[0], f"burnish {' '.join(words)}"


def campaigns_in(path: Path) -> Iterator[dict[str, Any]]:
    for block in re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        content = parse_document(block, Anything, name=named(path)).model_dump()
        if set(content) <= set(CampaignConfig.model_fields):
            yield content


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if any(campaigns_in(path))], ids=named)
def test_a_document_shows_campaign_files_that_are_taken(path: Path):
    for content in campaigns_in(path):
        config = CampaignConfig.model_validate(LEAST | content)
        parse_policy(config.policy.constraints, config.policy.objectives, signature=config.policy.signature)


def test_the_readme_names_every_command_and_every_extra():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in COMMAND.commands if f"`burnish {name}" not in readme] == []
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    own = sorted(set(extras) - {"all", "dev"})
    assert [name for name in own if f"`{name}`" not in readme] == []
    inside = re.search(r"\[(.*)\]", extras["all"][0])
    assert inside is not None
    outside = " and ".join(f"`{name}`" for name in own if name not in inside[1].split(","))
    assert f"{outside} are not in `all`" in readme
