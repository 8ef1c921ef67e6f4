"""The one YAML loader: safe, small, and exact about what is wrong and where.

Documents are read by the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema): only ``true`` and
``false`` are booleans, ``1e-3`` is a number, and a date, ``on`` or ``012:30`` is text. Keys are always text. Tags
that build objects, merge keys, duplicate keys and numbers that are not finite are refused.
"""

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from registry.errors import DocumentError

M = TypeVar("M", bound=BaseModel)
KeyPath = tuple[str | int, ...]

MAX_BYTES = 1_000_000
MAX_NODES = 100_000
MAX_DEPTH = 50
MAX_PROBLEMS = 10
_SHOWN_CHARACTERS = 60
_STANDARD_TAG = "tag:yaml.org,2002:"


def load_document(path: Path, model: type[M]) -> M:
    """The document at ``path`` as an instance of ``model``.

    Raises:
        DocumentError: the file is missing, unreadable or too large, is not YAML, or does not fit the model. The
            message has one line a problem, with file, line, key path, value and what to do.
    """
    return parse_document(_read(path), model, name=str(path))


def parse_document(text: str, model: type[M], *, name: str) -> M:
    """The YAML text as an instance of ``model``; ``name`` stands for the file in messages.

    Raises:
        DocumentError: as `load_document`.
    """
    tree = _parse(text, name)
    if not isinstance(tree.value, dict):
        what = "empty" if tree.value is None else f"{_kind(tree.value)}, not a mapping of keys to values"
        keys = ", ".join(_names(model))
        raise DocumentError(f"{tree.at(())}: the document is {what}; its keys may be: {keys}")
    return _fitted(tree, model)


def _fitted(tree: "_Tree", model: type[M]) -> M:
    try:
        return model.model_validate(tree.value)
    except ValidationError as error:
        raise _refusal(_explain(tree, model, error)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A document, or a part of one, that was read and not checked yet; it knows on which line each of its keys stands.

    Attributes:
        name: of the file, for messages.
        value: plain values.
        lines: key path, from this part on -> line.
    """

    name: str
    value: Any
    lines: Mapping[KeyPath, int]

    @property
    def place(self) -> str:
        """``file:line``."""
        return f"{self.name}:{self.lines.get((), 1)}"

    def part(self, *path: str | int) -> "Document":
        """The part at a key path, which is there."""
        value = self.value
        for key in path:
            value = value[key]
        lines = {inner: self.lines[(*path, *inner)] for inner in _paths(value) if (*path, *inner) in self.lines}
        return Document(name=self.name, value=value, lines=lines)

    def only(self, keys: Iterable[str]) -> "Document":
        """The same mapping with these of its keys alone."""
        value = {key: self.value[key] for key in keys if key in self.value}
        return Document(name=self.name, value=value, lines={path: self.lines[path] for path in _paths(value)})

    def over(self, lower: "Document") -> "Document":
        """This one laid over another: mappings key by key; whatever else stands here is taken whole.

        A mapping of another ``kind`` than the one below is taken whole, too.
        """
        lines: dict[KeyPath, int] = {}
        return Document(name=self.name, value=_laid(self, lower, (), lines), lines=lines)

    def as_model(self, model: type[M]) -> M:
        """The model that it is.

        Raises:
            DocumentError: it does not fit; as `load_document`.
        """
        return _fitted(_Tree(name=self.name, value=self.value, lines=dict(self.lines)), model)


def read_document(path: Path) -> Document:
    """The document at ``path``, a mapping of keys to values, before it is held against a model.

    Raises:
        DocumentError: the file is missing, unreadable or too large, or is not YAML.
    """
    tree = _parse(_read(path), str(path))
    if not isinstance(tree.value, dict):
        what = "empty" if tree.value is None else f"{_kind(tree.value)}, not a mapping of keys to values"
        raise DocumentError(f"{tree.at(())}: the document is {what}")
    return Document(name=tree.name, value=tree.value, lines=tree.lines)


def _paths(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """The key paths of a value, its own first."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from _paths(item, (*path, key))


def _laid(upper: Document, lower: Document, path: KeyPath, lines: dict[KeyPath, int]) -> Any:
    """The value at a path of one document over another; notes the lines of what it takes from either."""
    above, below = upper.value, lower.value
    both = isinstance(above, dict) and isinstance(below, dict)
    if both and above.get("kind", below.get("kind")) == below.get("kind"):
        lines[path] = upper.lines.get((), 1)
        laid = {}
        for key in {**below, **above}:
            sides = [side.part(key) for side in (upper, lower) if key in side.value]
            laid[key] = _laid(sides[0], sides[-1], (*path, key), lines)
        return laid
    lines.update({(*path, *inner): line for inner, line in upper.lines.items()})
    return above


# --- text to values --------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2's core schema, and a limit on nesting."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  PyYAML's own form
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(_STANDARD_TAG + _tag, re.compile(rf"(?:{_pattern})\Z"), _first)


@dataclass
class _Tree:
    """A document as plain values, with the line of each key path."""

    name: str
    value: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    nodes: int = 0

    def at(self, path: KeyPath) -> str:
        """``file:line`` of the path, or of the nearest thing around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.name}:{self.lines.get(path, 1)}"

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        """The plain value of a node; notes its line, and what is wrong with it."""
        self.nodes += 1
        if self.nodes > MAX_NODES or len(path) > MAX_DEPTH:
            raise DocumentError(
                f"{self.at(path)}: {_dotted(path)}: the document grows beyond {MAX_NODES} values or {MAX_DEPTH} levels"
                " once its aliases are written out; write less, or without aliases"
            )
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode) and self._plain(node, path, "map"):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and self._plain(node, path, "seq"):
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and self._plain(node, path, "str", "int", "float", "bool", "null"):
            return self._scalar(node, path)
        return None

    def _plain(self, node: yaml.Node, path: KeyPath, *allowed: str) -> bool:
        tag = node.tag.removeprefix(_STANDARD_TAG)
        if tag not in allowed:
            self.note(path, f"the tag {node.tag!r} is refused; leave it out")
        return tag in allowed

    def note(self, path: KeyPath, problem: str, *, line: int | None = None) -> None:
        """Keeps a problem with its place."""
        place = self.at(path) if line is None else f"{self.name}:{line}"
        self.problems.append(f"{place}: {_dotted(path)}: {problem}" if path else f"{place}: {problem}")

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.note(path, f"a key is {key_node.id}; keys are text", line=line)
                continue
            key = str(key_node.value)
            here = (*path, key)
            if key == "<<":
                self.note(here, "merge keys are refused; write the keys out", line=line)
            elif key in content:
                self.note(here, f"the key is given twice, first on line {self.lines[here]}; keep one", line=line)
            else:
                self.lines[here] = line
                content[key] = self.build(value_node, here)
        return content

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> bool | int | float | str | None:
        tag, text = node.tag.removeprefix(_STANDARD_TAG), str(node.value)
        try:
            if tag == "int":
                return int(text, 0) if text[:2] in {"0o", "0x"} else int(text)
            if tag == "float":
                return self._finite(text, path)
        except ValueError:
            self.note(path, f"{_shown(text)} is not a number; write one, or quote it as text")
            return None
        if tag == "bool":
            return text.lower() == "true"
        return None if tag == "null" else text

    def _finite(self, text: str, path: KeyPath) -> float:
        number = float(re.sub(r"\.(inf|nan)\Z", r"\1", text.lower()))
        if not math.isfinite(number):
            self.note(path, f"{text} is not a finite number; give a finite one")
        return number


def _read(path: Path) -> str:
    if not path.exists():
        near = _nearest(path.name, (other.name for other in path.parent.glob("*"))) if path.parent.is_dir() else None
        hint = f"Did you mean {path.parent / near}?" if near else "Check the path."
        raise DocumentError(f"there is no file {path}", hint=hint)
    if not path.is_file():
        raise DocumentError(f"{path} is not a file", hint="Name the YAML file itself.")
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        _check_size(len(content), str(path))
        return content.decode("utf-8-sig")
    except OSError as error:
        raise DocumentError(f"{path} cannot be read: {error.strerror}", hint="Check its permissions.") from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DocumentError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from error


def _check_size(size: int, name: str) -> None:
    if size > MAX_BYTES:
        raise DocumentError(f"{name} is larger than {MAX_BYTES} bytes; is it the right file?")


def _parse(text: str, name: str) -> _Tree:
    _check_size(len(text.encode(errors="replace")), name)
    tree = _Tree(name=name)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        raise DocumentError(_malformed(text, name, error)) from error
    if node is not None:
        tree.value = tree.build(node, ())
    if tree.problems:
        raise _refusal(tree.problems)
    return tree


def _malformed(text: str, name: str, error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        line = text[: error.position].count("\n") + 1
        character = chr(error.character) if isinstance(error.character, int) else error.character
        return f"{name}:{line}: the character {character!r} may not stand in YAML; remove it"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        line = error.problem_mark.line
        lines = text.splitlines()
        shown = f": {_shown(lines[line].strip())}" if line < len(lines) else ""
        context = f" ({error.context})" if error.context else ""
        return f"{name}:{line + 1}: not valid YAML{shown}: {error.problem}{context}; check indents, colons and quotes"
    return f"{name}:1: not valid YAML: {error}"


# --- what does not fit the model -------------------------------------------------------------------------------


def _refusal(problems: list[str]) -> DocumentError:
    more = len(problems) - MAX_PROBLEMS
    lines = problems[:MAX_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
    return DocumentError("\n".join(lines))


def _explain(tree: _Tree, model: type[BaseModel], error: ValidationError) -> list[str]:
    """One line for each place that does not fit, in the order of the file."""
    found: dict[KeyPath, list[str]] = {}
    for detail in error.errors(include_url=False):
        path, place = _locate(model, detail["loc"])
        if detail["type"] == "union_tag_invalid":
            path = (*path, detail["ctx"]["discriminator"].strip("'"))
        found.setdefault(path, []).append(_problem(detail, path, place))
    # Where a value may take several forms, the form with errors inside is the one that was meant.
    meant = [path for path in found if not any(other[: len(path)] == path for other in found if len(other) > len(path))]
    meant.sort(key=lambda path: (int(tree.at(path).rpartition(":")[2]), [str(item) for item in path]))
    lines = []
    for path in meant:
        problems = list(dict.fromkeys(found[path]))
        prefix = f"{tree.at(path)}: {_dotted(path)}: " if path else f"{tree.at(path)}: "
        lines.append(prefix + "; or ".join(problems))
    return lines


def _problem(detail: ErrorDetails, path: KeyPath, place: Any) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "missing":
        return "the key is missing; add it"
    if kind == "extra_forbidden":
        names = _names(place)
        near = _nearest(str(path[-1]), names)
        known = f"did you mean {near!r}?" if near else f"the keys here are: {', '.join(names) or 'none'}"
        return f"unknown key {str(path[-1])!r}; {known}"
    if kind == "secret":
        return str(detail["msg"])
    value = context["tag"] if kind == "union_tag_invalid" else detail["input"]
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message.replace("Input should be", "must be").replace("Input", "it")
    message = re.sub(r"a valid dictionary( or .*)?$", "a mapping of keys to values", message)
    if kind == "union_tag_invalid":
        message = f"must be one of {context['expected_tags']}"
    if kind == "union_tag_not_found":
        message = f"the key {context['discriminator']} is missing, which says what this is; add it"
    if kind == "value_error" and isinstance(value, dict):
        return message  # of keys that do not go together: all that stands there says no more
    choices = re.findall(r"'([^']*)'", str(context.get("expected_tags", context.get("expected", ""))))
    near = _nearest(str(value), choices)
    return f"{_shown(value)}: {message}" + (f"; did you mean {near!r}?" if near else "")


def _locate(model: type[BaseModel], location: tuple[str | int, ...]) -> tuple[KeyPath, Any]:
    """The key path of a pydantic location, and the type that holds its last key.

    Pydantic puts the name of a union's member, or its tag, between the keys; those are no keys of the document.
    """
    here: Any = model
    holder: Any = model
    path: list[str | int] = []
    for item in location:
        members = _members(here)
        if len(members) > 1:
            here = _branch(members, str(item))
        elif item != "[key]":
            holder = members[0]
            path.append(item)
            here = _child(holder, item)
    return tuple(path), holder


def _bare(annotation: Any) -> Any:
    return _bare(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def _members(annotation: Any) -> list[Any]:
    """The members of a union without None; for anything else, itself."""
    bare = _bare(annotation)
    if get_origin(bare) not in {Union, UnionType}:
        return [bare]
    kept = [member for member in get_args(bare) if member is not NoneType]
    return _members(kept[0]) if len(kept) == 1 else kept


def _branch(members: list[Any], label: str) -> Any:
    """The member of a union that pydantic names by ``label``: a tag, a class name, or a generic type."""
    for member in members:
        bare = _bare(member)
        if _is_model(bare) and (label in _tags(bare) or label == bare.__name__):
            return bare
    for member in members:
        bare = _bare(member)
        origin = get_origin(bare)
        if origin in {Union, UnionType} and label.startswith("tagged-union["):
            return bare
        if _is_model(bare) and f"{bare.__name__}]" in label:
            return bare
        if origin is not None and label.startswith(f"{getattr(origin, '__name__', '')}["):
            return bare
    return Any


def _tags(model: type[BaseModel]) -> set[str]:
    """What the single-valued fields of a model hold: the tags it may go by."""
    annotations = [_bare(known.annotation) for known in model.model_fields.values()]
    return {str(tag) for annotation in annotations if get_origin(annotation) is Literal for tag in get_args(annotation)}


def _child(holder: Any, item: str | int) -> Any:
    if _is_model(holder):
        known = holder.model_fields
        return next((known[name].annotation for name in known if item in {name, _written(holder, name)}), Any)
    arguments = get_args(holder)
    if not arguments:
        return Any
    if get_origin(holder) is tuple and isinstance(item, int) and ... not in arguments:
        return arguments[item] if item < len(arguments) else Any
    return arguments[0] if isinstance(item, int) else arguments[-1]


def _is_model(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)


def _written(model: type[BaseModel], name: str) -> str:
    known = model.model_fields[name]
    return known.validation_alias if isinstance(known.validation_alias, str) else known.alias or name


def _names(place: Any) -> list[str]:
    return [_written(place, name) for name in place.model_fields] if _is_model(place) else []


# --- words -----------------------------------------------------------------------------------------------------


def _nearest(word: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(names), n=1)), None)


def _dotted(path: KeyPath) -> str:
    """``stages[0].params.scheme`` for ``("stages", 0, "params", "scheme")``."""
    text = "".join(f"[{item}]" if isinstance(item, int) else f".{item}" for item in path)
    return text.removeprefix(".")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"the single value {_shown(value)}"
