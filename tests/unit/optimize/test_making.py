"""The step that makes a variant, where nothing has to be made to see what it does."""

from pathlib import Path
from typing import Any

import pytest

from optimize.engines.port import Place
from optimize.making import make_in_place
from optimize.recipes import recipe, tool_versions
from registry.codec import to_jsonable
from registry.errors import InputError
from registry.store import FolderStore


def made_there(tmp_path: Path, versions: dict[str, str]) -> Any:
    """The step, on a node that may have other versions than the variant is known by."""
    wanted = recipe("int8-dynamic", instruction_sets=())
    variant = {
        "id": "v",
        "recipe": to_jsonable(wanted),
        "seed": 0,
        "tool_versions": tool_versions(wanted) | versions,
    }
    place = Place(store=FolderStore(tmp_path), scratch=tmp_path, cpus=(0,))
    limits = {"timeout_s": 60.0, "memory_mb": None}
    return make_in_place(place, source={}, variant=variant, foreseen=False, origin=None, **limits)


def test_a_node_with_other_versions_than_the_variant_is_known_by_makes_nothing(tmp_path: Path):
    with pytest.raises(InputError, match=r" has onnxruntime [0-9.]+, not 1\.2\.3\nInstall"):
        made_there(tmp_path, {"onnxruntime": "1.2.3"})
    with pytest.raises(InputError, match="Source"):  # it goes on to the source, of which there is none
        made_there(tmp_path, {})
