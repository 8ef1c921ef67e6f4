import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry import codec, records
from registry.errors import InputError
from registry.records import Artifact, ClosedLoop, Comparison, Estimate, Failure, LoadProfile, StageCall, exact

CLASSES = [one for one in vars(records).values() if inspect.isclass(one) and one.__module__ == records.__name__]
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=8)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def estimates(draw: Any) -> Estimate:
    low, value, high = sorted(draw(st.tuples(FLOATS, FLOATS, FLOATS)))
    ends = st.booleans()
    return Estimate(
        value=value,
        low=low if draw(ends) else None,
        high=high if draw(ends) else None,
        runs=draw(st.integers(0, 99)),
        method=draw(TEXT),
        unit=draw(TEXT),
    )


def strategy(hint: Any) -> st.SearchStrategy[Any]:
    """Anything that fits a type hint of a record."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    simple = {bool: st.booleans(), int: st.integers(), float: FLOATS, str: TEXT, types.NoneType: st.none()}
    if hint in simple:
        return simple[hint]
    if hint is Estimate:
        return estimates()
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.deferred(lambda: st.builds(hint, **{name: strategy(one) for name, one in hints.items()}))
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin in {typing.Union, types.UnionType}:
        return st.one_of([strategy(one) for one in arguments])
    if origin is tuple and arguments[-1] is ...:
        return st.lists(strategy(arguments[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*[strategy(one) for one in arguments])
    if origin is Mapping:
        return st.dictionaries(strategy(arguments[0]), strategy(arguments[1]), max_size=2)
    raise TypeError(f"no strategy for {hint}")


@pytest.mark.parametrize("record_type", CLASSES, ids=lambda one: one.__name__)
def test_any_record_is_the_same_after_a_round_trip(record_type):
    @settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy(record_type))
    def check(record):
        text = codec.dumps(record)
        assert "\n" not in text
        again = codec.loads(text)
        assert again == record
        assert _types(again) == _types(record)
        assert codec.dumps(again) == text

    check()


def _types(value: Any) -> Any:
    """The types of all that a value holds: 1 and 1.0 and True are equal, but not the same."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: _types(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return type(value), fields
    if isinstance(value, tuple):
        return [_types(one) for one in value]
    if isinstance(value, Mapping):
        return {name: _types(one) for name, one in value.items()}
    return type(value)


def test_scalars_of_parameters_keep_their_types():
    call = StageCall(name="q", params={"a": 1, "b": 1.0, "c": True, "d": "1", "e": None, "f": "true", "g": ("x", "1")})
    again = codec.loads(codec.dumps(call))
    assert again == call
    assert _types(again) == _types(call)


def test_the_envelope_names_type_and_schema():
    envelope = json.loads(codec.dumps(exact(1.0, "ms")))
    assert envelope["schema"] == codec.SCHEMA
    assert envelope["type"] == "Estimate"
    assert envelope["record"]["value"] == 1.0


def test_numbers_that_json_has_no_word_for_are_refused():
    profile = LoadProfile(name="x", load=ClosedLoop(concurrency=1), warmup_s=float("nan"), duration_s=1.0)
    with pytest.raises(ValueError, match="JSON compliant"):
        codec.dumps(profile)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "not a record of burnish"),
        ("[1]", "not a record of burnish"),
        ("null", "not a record of burnish"),
        ('{"schema": 1, "type": "Estimate"}', "not a record of burnish"),
        ('{"schema": 2, "type": "Estimate", "record": {}}', "a record of schema 2; this burnish reads schema 1"),
        ('{"schema": 1, "type": "Nothing", "record": {}}', "the unknown type 'Nothing'"),
        ('{"schema": 1, "type": "Mapping", "record": {}}', "the unknown type 'Mapping'"),
        ('{"schema": 1, "type": "math", "record": {}}', "the unknown type 'math'"),
        ('{"schema": 1, "type": ["Estimate"], "record": {}}', "the unknown type"),
        ('{"schema": 1, "type": "ArtifactFile", "record": {"path": "a"}}', "not a valid ArtifactFile"),
        ('{"schema": 1, "type": "ClosedLoop", "record": {"concurrency": "many"}}', "not a valid ClosedLoop"),
        ('{"schema": 1, "type": "ClosedLoop", "record": {"concurrency": 1, "more": 2}}', "not a valid ClosedLoop"),
        ('{"schema": 1, "type": "ClosedLoop", "record": {"concurrency": NaN}}', "not a valid ClosedLoop"),
    ],
)
def test_what_is_no_record_is_refused(text, part):
    with pytest.raises(InputError) as caught:
        codec.loads(text)
    assert part in str(caught.value)


def test_a_record_that_contradicts_itself_is_refused():
    text = codec.dumps(Estimate(value=1.0, low=0.0, high=2.0, runs=1, method="m", unit="1"))
    with pytest.raises(InputError, match="out of order"):
        codec.loads(text.replace('"high":2.0', '"high":-2.0'))


def test_an_unknown_field_deep_inside_is_refused():
    failure = StageCall(name="a", params={"b": 1})
    recipe = records.Recipe(name="r", stages=(failure,), engines=())
    text = codec.dumps(recipe).replace('"name":"a"', '"name":"a","more":1')
    with pytest.raises(InputError, match="not a valid Recipe"):
        codec.loads(text)


def test_words_outside_their_list_are_refused():
    failure = Failure(subject="a", phase="make", kind="error", reason="r")
    with pytest.raises(InputError, match="not a valid Failure"):
        codec.loads(codec.dumps(failure).replace('"make"', '"somewhere"'))


def test_digests_do_not_depend_on_the_order_of_keys():
    assert codec.digest({"a": 1, "b": [1, 2]}) == codec.digest({"b": (1, 2), "a": 1})
    assert codec.digest({"a": 1}) != codec.digest({"a": 1.0})
    assert codec.digest("ä") == codec.digest("ä")
    assert len(codec.digest(None)) == 16


def test_canonical_json_is_one_line_and_keeps_text_readable():
    assert codec.canonical({"b": "ä\n", "a": 1}) == '{"a":1,"b":"ä\\n"}'


def test_a_record_can_be_read_without_its_envelope():
    comparison = Comparison(
        candidate_id="a",
        baseline_id="b",
        metric="m",
        load=None,
        ratio=exact(1.0, "1"),
        noise_floor=0.02,
        word="equivalent",
    )
    assert codec.from_jsonable(Comparison, codec.to_jsonable(comparison)) == comparison
    artifact = Artifact(digest="0", format="onnx", entry="a", files=(), inputs=(), outputs=())
    assert codec.from_jsonable(Artifact, codec.to_jsonable(artifact)) == artifact


def test_a_fidelity_of_before_there_were_notes_is_read():
    from tests.doubles.campaigns import fidelities

    known = fidelities()[0]
    envelope = json.loads(codec.dumps(known))
    del envelope["record"]["notes"]
    assert codec.loads(json.dumps(envelope)) == known
    told = dataclasses.replace(known, notes=("the slice with the largest drop is 'night'",))
    assert codec.loads(codec.dumps(told)) == told
