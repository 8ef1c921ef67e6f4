import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import PolicyError
from registry.policy import DEFAULT_LOAD, METRICS, loads_named, metric_of, parse_policy, slo_limit
from registry.records import Constraint, Objective, Policy

GOAL = "maximize max_throughput_rps"


def constraint(text: str) -> Constraint:
    return parse_policy([text], GOAL).constraints[0]


def refused(text: str, *, objective: bool = False) -> str:
    with pytest.raises(PolicyError) as caught:
        parse_policy([], text) if objective else parse_policy([text], GOAL)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "metric", "op", "limit", "relative", "load"),
    [
        ("accuracy_drop <= 0.01", "accuracy_drop", "<=", 0.01, False, None),
        ("accuracy_drop <= 1% rel", "accuracy_drop", "<=", 0.01, True, None),
        ("accuracy_drop<=1%rel", "accuracy_drop", "<=", 0.01, True, None),
        ("accuracy_drop <= -0.5%", "accuracy_drop", "<=", -0.005, False, None),
        ("flip_rate <= 2%", "flip_rate", "<=", 0.02, False, None),
        ("flip_rate < 2.3 %", "flip_rate", "<", 0.023, False, None),
        ("slice_drop_max <= 3%", "slice_drop_max", "<=", 0.03, False, None),
        ("snr_db >= 30", "snr_db", ">=", 30, False, None),
        ("cosine > .99", "cosine", ">", 0.99, False, None),
        ("rss_mb <= 600", "rss_mb", "<=", 600, False, None),
        ("rss_mb <= 120% rel", "rss_mb", "<=", 1.2, True, None),
        ("rss_mb <= 1.2 rel", "rss_mb", "<=", 1.2, True, None),
        ("max_throughput_rps >= 1e3", "max_throughput_rps", ">=", 1000, False, None),
        ("latency_p90_ms <= 50", "latency_p90_ms", "<=", 50, False, "0.8 saturation"),
        ("latency_p90_ms <= 50 at 0.80 saturation", "latency_p90_ms", "<=", 50, False, "0.8 saturation"),
        ("latency_p90_ms <= 50 at 80% saturation", "latency_p90_ms", "<=", 50, False, "0.8 saturation"),
        ("latency_p99_ms <= 25 at 100.0 rps", "latency_p99_ms", "<=", 25, False, "100 rps"),
        ("latency_p99_ms <= 25 at 100rps", "latency_p99_ms", "<=", 25, False, "100 rps"),
        ("service_p50_ms <= 50% rel at concurrency 1", "service_p50_ms", "<=", 0.5, True, "concurrency 1"),
    ],
)
def test_constraints(text, metric, op, limit, relative, load):
    assert constraint(f"  {text} ") == Constraint(
        text=text, metric=metric, op=op, limit=limit, relative=relative, load=load
    )


def test_objectives_keep_their_order():
    policy = parse_policy(
        ["accuracy_drop <= 0.01"], ["minimize latency_p90_ms at 100 rps", "maximize max_throughput_rps"]
    )
    assert policy == Policy(
        constraints=(Constraint(text="accuracy_drop <= 0.01", metric="accuracy_drop", op="<=", limit=0.01),),
        objectives=(
            Objective(
                text="minimize latency_p90_ms at 100 rps",
                direction="minimize",
                metric="latency_p90_ms",
                load="100 rps",
            ),
            Objective(text=GOAL, direction="maximize", metric="max_throughput_rps"),
        ),
    )


def test_loads_are_named_once_in_order():
    policy = parse_policy(
        ["latency_p90_ms <= 5", "latency_p50_ms <= 2 at concurrency 1", "latency_p99_ms <= 9 at 80% saturation"],
        "minimize latency_p50_ms at 50 rps",
    )
    assert loads_named(policy) == ("0.8 saturation", "concurrency 1", "50 rps")
    assert loads_named(parse_policy([], GOAL)) == ()


@pytest.mark.parametrize(
    ("text", "wrong", "parts"),
    [
        ("acuracy_drop <= 0.01", "acuracy_drop", ["unknown metric", "Did you mean accuracy_drop?"]),
        ("zzz <= 0.01", "zzz", ["The metrics are: accuracy, "]),
        ("accuracy_drop ≤ 0.01", "≤", ["Did you mean <=?"]),
        ("accuracy_drop == 0.01", "==", ["expected <=, >=, < or >"]),
        ("accuracy_drop 0.01", "0.01", ["expected <=, >=, < or >"]),
        ("accuracy_drop <= much", "much", ["expected a number"]),
        ("accuracy_drop <= 1e999", "1e999", ["too large"]),
        ("accuracy_drop <= 1e999999999999999999%", "1e999999999999999999", ["too large"]),
        ("rss_mb <= 1e99999999999999999999", "1e99999999999999999999", ["too large"]),
        ("rss_mb <= 120%", "%", ["this metric is in MB", "Write 120% rel"]),
        ("latency_p90_ms <= 50 ms", "ms", ["Leave out the unit"]),
        ("rss_mb <= 600 at 0.8 saturation", "at", ["rss_mb belongs to no load"]),
        ("latency_p90_ms <= 50 at", None, ["expected a load", "0.8 saturation, 100 rps or concurrency 1"]),
        ("latency_p90_ms <= 50 at full saturation", "full", ["expected a load"]),
        ("latency_p90_ms <= 50 at 0.8 saturaton", "saturaton", ["Did you mean saturation?"]),
        ("latency_p90_ms <= 50 at 100", None, ["expected saturation or rps"]),
        ("latency_p90_ms <= 50 at 80 saturation", "80", ["above 0 and at most 1"]),
        ("latency_p90_ms <= 50 at 0 rps", "0 rps"[0], ["a rate is above 0"]),
        ("latency_p90_ms <= 50 at concurrency 1.5", "1.5", ["whole number"]),
        ("latency_p90_ms <= 50 at concurrency", None, ["whole number"]),
        ("latency_p90_ms <= 50 on 100 rps", "on", ["should end here"]),
        ("accuracy_drop <= 1% relative", "relative", ["unexpected 'relative'", "Did you mean rel?"]),
        ("accuracy_drop <= 0.01 please", "please", ["the line should end here"]),
        ("accuracy_drop <= 0.01, flip_rate <= 2%", ",", ["the line should end here"]),
        ("accuracy_drop <=", None, ["expected a number"]),
        ("", None, ["expected a metric"]),
        ("<= 3", "<=", ["expected a metric"]),
        ("rss_mb <= 600 vs champion", "vs", ["only a limit that is a part", "105% rel vs champion"]),
        ("rss_mb <= 110% rel vs campion", "campion", ["expected baseline or champion", "Did you mean champion?"]),
        ("rss_mb <= 110% rel vs", None, ["expected baseline or champion after vs"]),
        ("rss_mb <= 110% rel champion", "champion", ["should end here"]),
        ("accuracy_drop <= 1% rel vs champion", "champion", ["from the baseline", "accuracy >= 99% rel vs champion"]),
        ("rss_mb.logits <= 3", "rss_mb.logits", ["unknown metric"]),
        ("cosine. >= 0.9", "cosine.", ["unknown metric"]),
    ],
)
def test_the_wrong_word_is_marked(text, wrong, parts):
    message = refused(text)
    _, shown, mark = message.splitlines()[:3]
    assert shown == f"  {text}"
    column = mark.index("^") - 2
    if wrong is None:
        assert column == len(text)
    else:
        assert text[column : column + mark.count("^")] == wrong
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("maximise max_throughput_rps", ["begins with maximize or minimize", "Did you mean maximize?"]),
        ("max_throughput_rps", ["begins with maximize or minimize"]),
        ("minimize max_throughput_rps", ["better the other way", "Write: maximize max_throughput_rps"]),
        ("maximize", ["expected a metric"]),
        ("maximize throughput", ["unknown metric 'throughput'", "Did you mean max_throughput_rps?"]),
        ("minimize size_mb at 100 rps", ["belongs to no load"]),
        ("minimize rss_mb rss_mb", ["should end here"]),
        ("minimize rss_mb weight", ["a weight is a number above 0"]),
        ("minimize rss_mb weight 0", ["a weight is a number above 0"]),
        ("minimize rss_mb weight -1", ["a weight is a number above 0"]),
        ("minimize rss_mb weight 2%", ["should end here, but '%' follows"]),
        ("minimize rss_mb weights 2", ["unexpected 'weights'", "Did you mean weight?"]),
        ("minimize accuracy_drop weight 2", ["accuracy_drop may be zero", "Put a limit on it"]),
    ],
)
def test_objectives_that_are_refused(text, parts):
    message = refused(text, objective=True)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "limit", "reference", "load"),
    [
        ("rss_mb <= 110% rel vs champion", 1.1, "champion", None),
        ("rss_mb <= 110% rel vs baseline", 1.1, "baseline", None),
        ("latency_p99_ms <= 1 rel vs champion at 100 rps", 1.0, "champion", "100 rps"),
        ("accuracy >= 99% rel vs champion", 0.99, "champion", None),
    ],
)
def test_a_limit_is_held_against_the_baseline_or_the_champion(text, limit, reference, load):
    read = constraint(text)
    assert (read.limit, read.relative, read.reference, read.load) == (limit, True, reference, load)


def test_a_metric_of_one_output_is_known():
    assert constraint("cosine.logits >= 0.999").metric == "cosine.logits"
    known = metric_of("cosine.logits")
    assert known is not None
    assert known.label == "cosine of logits"


def test_objectives_may_have_weights():
    policy = parse_policy([], ["maximize max_throughput_rps weight 2", "minimize latency_p90_ms at 10 rps weight .5"])
    assert [objective.weight for objective in policy.objectives] == [2.0, 0.5]
    assert policy.objectives[1].load == "10 rps"
    with pytest.raises(PolicyError, match=r"this one has none\n  minimize rss_mb\n {17}\^"):
        parse_policy([], ["maximize max_throughput_rps weight 2", "minimize rss_mb"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("rss_mb <= 600", "rss_mb >= 700"),
        ("rss_mb < 600", "rss_mb >= 600"),
        ("rss_mb > 600", "rss_mb <= 600"),
        ("rss_mb > 600", "rss_mb < 600"),
        ("flip_rate <= 2%", "flip_rate > 0.03"),
        ("latency_p90_ms <= 5", "latency_p90_ms >= 6 at 80% saturation"),
        ("rss_mb <= 90% rel vs champion", "rss_mb >= 1 rel vs champion"),
    ],
)
def test_constraints_that_contradict_each_other_are_named(one, other):
    for first, second in ((one, other), (other, one)):
        with pytest.raises(PolicyError) as caught:
            parse_policy([first, "size_mb <= 5", second], GOAL)
        told, *shown = caught.value.message.splitlines()
        assert told == f"no value of {one.split()[0]} meets both of these limits"
        assert [shown[0], shown[2]] == [f"  {first}", f"  {second}"]
        for line, mark in (shown[:2], shown[2:]):
            assert line[mark.index("^") : mark.rindex("^") + 1] == line.split()[2].removesuffix("%")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("rss_mb <= 600", "rss_mb >= 600"),
        ("rss_mb <= 600", "rss_mb <= 700"),
        ("rss_mb <= 600", "rss_mb >= 110% rel"),
        ("rss_mb <= 90% rel", "rss_mb >= 1 rel vs champion"),
        ("latency_p90_ms <= 5 at 10 rps", "latency_p90_ms >= 6 at 100 rps"),
    ],
)
def test_constraints_that_may_both_be_met_are_taken(one, other):
    assert len(parse_policy([one, other], GOAL).constraints) == 2


def test_no_objective_is_refused():
    with pytest.raises(PolicyError, match="no objective"):
        parse_policy([], [])


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (" 0.80  saturation", "0.8 saturation"),
        ("1e2 rps", "100 rps"),
        ("concurrency 08", "concurrency 8"),
        (DEFAULT_LOAD, DEFAULT_LOAD),
    ],
)
def test_loads_have_one_form(text, normal):
    for written in (text, normal):
        assert loads_named(parse_policy([f"latency_p90_ms <= 5 at {written}"], GOAL)) == (normal,)


@given(
    st.sampled_from(sorted(METRICS)),
    st.sampled_from(["<=", ">=", "<", ">"]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
)
def test_any_number_is_read_as_python_writes_it(metric, op, limit, relative):
    read = constraint(f"{metric} {op} {limit!r}{' rel' if relative else ''}")
    assert (read.metric, read.op, read.limit, read.relative) == (metric, op, limit, relative)
    assert (read.load is not None) == METRICS[metric].needs_load


@given(st.text(max_size=40))
def test_any_text_is_understood_or_refused(text):
    for lines, objective in (([text], GOAL), ([], text)):
        try:
            parse_policy(lines, objective)
        except PolicyError as error:
            message = error.message
        else:
            message = "understood ^"
        assert "^" in message


def test_the_highest_rate_needs_a_latency_limit():
    goal = "maximize slo_max_rps"
    lines = ["latency_p99_ms <= 80% rel at 100 rps", "latency_p90_ms <= 25", "latency_p99_ms < 90"]
    kept = slo_limit(parse_policy(lines, goal))
    assert kept is not None
    assert (kept.metric, kept.limit) == ("latency_p90_ms", 25)
    assert slo_limit(parse_policy(lines, "maximize max_throughput_rps")) is None
    assert slo_limit(parse_policy([*lines, "slo_max_rps >= 100"], "maximize saturation_rps")) == kept
    with pytest.raises(PolicyError, match="the policy has none"):
        slo_limit(parse_policy(lines[:1], goal))
