"""Our session, and a server's class around it, as one Python file that stands beside a model.

It is for servers whose image has nothing of burnish. The file is named by a digest of its text, because a server's
process knows a module by its name alone: a second file of the same name would never be read, and the second model
would answer with the code of the first.
"""

import ast
import hashlib
import io
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import TypeGuard

from registry.errors import InputError
from registry.records import Candidate

PACKAGE = "profiles.serving"
PREFIX = "burnish_runtime_"
_HOUSE = ("optimize", "profiles", "registry")
_PLAIN = (
    ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef,
    ast.Assign, ast.AnnAssign, ast.Expr,
)  # fmt: skip
_INDENT = "    "
_HEAD = '''"""Serves one ONNX or OpenVINO file, and needs nothing of burnish but what is in here.

It is made of these, and named by a digest of its text, so change nothing here:
{files}
"""
# SPDX-License-Identifier: Apache-2.0

if "{class_name}" not in globals():  # MLServer runs it anew at each load; what requests are using stays as it is
'''

Read = Callable[[str], str]
"""Name of a module in `PACKAGE` -> its source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A Python file that needs nothing of burnish but what is in it.

    Attributes:
        class_name: what a server loads from it.
        text: what is in it.
    """

    class_name: str
    text: str

    @property
    def module(self) -> str:
        """The module's name, see `module_name`."""
        return module_name(self.text.encode())

    @property
    def file(self) -> str:
        """The file's name."""
        return f"{self.module}.py"

    @property
    def implementation(self) -> str:
        """The class as MLServer's settings name it."""
        return f"{self.module}.{self.class_name}"


def module_name(content: bytes) -> str:
    """The name of a file's module: `PREFIX` and the first 12 digits of the SHA-256 (hex) of what is in it."""
    return PREFIX + hashlib.sha256(content).hexdigest()[:12]


def source_of(name: str) -> str:
    """The source of a module of `PACKAGE`, as it is installed."""
    return resources.files(PACKAGE).joinpath(f"{name}.py").read_text(encoding="utf-8")


def bundle_for(candidate: Candidate) -> Bundle:
    """The file that stands beside this candidate's model.

    Raises:
        InputError: its server needs no code of ours.
    """
    serving = candidate.serving
    if serving.server == "mlserver":
        return bundle("runtime", "SessionRuntime")
    if serving.backend == "python":
        return bundle("triton_model", "TritonPythonModel")
    raise InputError(
        f"{candidate.name!r} is served by Triton's own backend {serving.backend}, which needs no code of burnish's",
        hint="Leave --self-contained out.",
    )


def bundle(entry: str, class_name: str, read: Read = source_of) -> Bundle:
    """A module of `PACKAGE`, and the modules of `PACKAGE` that it imports, in one file.

    The sources are kept as they are, one after the other, each after those that it imports: only the imports between
    them are left out. So a traceback shows lines of this file. The same sources give the same bytes.

    Args:
        entry: the module.
        class_name: the class in it that a server loads.
        read: gives the sources.

    Raises:
        ValueError: they cannot share a namespace, or need more of burnish than `PACKAGE`.
    """
    parts: dict[str, _Part] = {}
    _collect(entry, read, parts)
    _check_names(parts)
    files = "\n".join(f"    {PACKAGE.replace('.', '/')}/{name}.py" for name in parts)
    sections = [f"# --- {name}.py ---\n\n{_indented(part.text)}" for name, part in parts.items()]
    body = "\n\n".join(_INDENT + section for section in sections)
    return Bundle(class_name=class_name, text=_HEAD.format(files=files, class_name=class_name) + body)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A module without its imports from others of `PACKAGE`.

    Attributes:
        text: its source.
        names: what its top level binds -> by which statement.
        wanted: the names that it imports from others.
    """

    text: str
    names: Mapping[str, str]
    wanted: frozenset[str]


def _collect(name: str, read: Read, parts: dict[str, _Part]) -> None:
    """Adds a module to ``parts``, after all that it imports."""
    text = read(name)
    tree = ast.parse(text, name)
    ours = [node for node in ast.walk(tree) if _is_ours(node)]
    wanted: set[str] = set()
    lines: list[str | None] = [*text.splitlines(keepends=True)]
    for node in ours:
        if not isinstance(node, ast.ImportFrom) or node not in tree.body or any(one.asname for one in node.names):
            raise ValueError(f"{name}.py:{node.lineno}: a bundled module imports ours by `from ... import name` alone")
        package, _, imported = str(node.module).rpartition(".")
        if package != PACKAGE:
            raise ValueError(f"{name}.py:{node.lineno}: {node.module} cannot be bundled, only modules of {PACKAGE}")
        if imported not in parts:
            _collect(imported, read, parts)
        wanted |= {one.name for one in node.names}
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
            lines[number - 1] = None
    if odd := [node.lineno for node in tree.body if not isinstance(node, _PLAIN)]:
        raise ValueError(f"{name}.py:{odd[0]}: a bundled module has imports, definitions and constants alone")
    names = dict(pair for node in tree.body if node not in ours for pair in _bound(node))
    kept = "".join(line for line in lines if line is not None)
    parts[name] = _Part(text=kept, names=names, wanted=frozenset(wanted))


def _is_ours(node: ast.AST) -> TypeGuard[ast.Import | ast.ImportFrom]:
    if isinstance(node, ast.Import):
        return any(alias.name.partition(".")[0] in _HOUSE for alias in node.names)
    return isinstance(node, ast.ImportFrom) and (node.level > 0 or str(node.module).partition(".")[0] in _HOUSE)


def _bound(node: ast.stmt) -> Iterator[tuple[str, str]]:
    """The names that a statement at the top level, one of `_PLAIN`, binds, each with what it is bound to."""
    if isinstance(node, ast.Import):
        yield from ((one.asname or one.name.partition(".")[0], f"import {one.name}") for one in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from ((one.asname or one.name, f"from {node.module} import {one.name}") for one in node.names)
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name, ast.unparse(node)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = (one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name))
        yield from ((name, ast.unparse(node)) for name in names)


def _check_names(parts: Mapping[str, _Part]) -> None:
    """Returns when one namespace can hold all modules: a name means the same in each that has it."""
    meant: dict[str, str] = {}
    for module, part in parts.items():
        for name, statement in part.names.items():
            if meant.setdefault(name, statement) != statement:
                raise ValueError(f"{module}.py: {name!r} is another thing in a module that is bundled with it")
        if missing := sorted(part.wanted - set(meant)):
            raise ValueError(f"{module}.py: nothing that is bundled with it defines {missing[0]!r}")


def _indented(text: str) -> str:
    """Python source one level deeper, but for lines that begin within a string that somebody reads."""
    within = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        for line in range(token.start[0] + 1, token.end[0] + 1)
        if token.type not in {tokenize.NEWLINE, tokenize.NL}
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.end_lineno is not None:
            within -= {*range(node.lineno, node.end_lineno + 1)}  # a docstring
    lines = enumerate(text.splitlines(keepends=True), start=1)
    return "".join(line if number in within or not line.strip() else _INDENT + line for number, line in lines)
