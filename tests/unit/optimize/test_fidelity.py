import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimize.fidelity import batch_dependence, compare_outputs, drop_by_slice, fidelity_components
from optimize.intervals import drop_of_scores, exact_bounds, net_bounds, rate, wilson
from optimize.metrics import Metric, find_metric
from registry.errors import InputError, StageError
from registry.records import EngineSpec


def scores(losses, gains, count):
    before, after = np.ones(count), np.ones(count)
    after[:losses] = 0
    before[losses : losses + gains] = 0
    return before, after


def drop(losses, gains, count):
    return drop_of_scores(*scores(losses, gains, count))


@pytest.mark.parametrize(("count", "expected"), [(300, 3 / 300), (890, 3 / 890), (3000, 3 / 3000)])
def test_zero_events_give_the_rule_of_three(count, expected):
    assert drop(0, 0, count).high == pytest.approx(expected, rel=0.01)
    assert rate(0, count).high == pytest.approx(expected, rel=0.01)


def test_two_discordant_of_897_pass_a_limit_of_one_point():
    assert drop(2, 0, 897).high < 0.01
    assert drop(1, 1, 897).high < 0.01
    assert drop(2, 0, 360).high > 0.01


def test_symmetric_discordance_of_some_per_cent_is_no_drop():
    estimate = drop(90, 90, 3000)
    assert estimate.value == 0
    assert estimate.high < 0.01


def test_exact_bounds_are_those_of_clopper_and_pearson():
    from scipy.stats import binomtest

    interval = binomtest(4, 897).proportion_ci(0.90, method="exact")
    assert exact_bounds(4, 897) == pytest.approx((interval.low, interval.high))
    assert exact_bounds(5, 5)[1] == 1.0


def test_wilson_is_scipys():
    from scipy.stats import binomtest

    interval = binomtest(871, 897).proportion_ci(0.95, method="wilson")
    assert wilson(871, 897) == pytest.approx((interval.low, interval.high), abs=1e-6)
    assert wilson(10, 10)[1] == 1.0


@given(st.integers(1, 400), st.data())
def test_more_losses_never_lower_the_bound(count, data):
    losses = data.draw(st.integers(0, count - 1))
    gains = data.draw(st.integers(0, count - losses - 1))
    assert net_bounds(losses + 1, gains, count)[1] >= net_bounds(losses, gains, count)[1]


@given(st.integers(1, 300), st.data())
def test_losses_and_gains_mirror_each_other(count, data):
    losses = data.draw(st.integers(0, count))
    gains = data.draw(st.integers(0, count - losses))
    low, high = net_bounds(losses, gains, count)
    mirrored = net_bounds(gains, losses, count)
    assert (low, high) == pytest.approx((-mirrored[1], -mirrored[0]))
    assert low <= (losses - gains) / count <= high


@pytest.mark.parametrize(("loss", "gain"), [(0.004, 0.0), (0.01, 0.004), (0.03, 0.03)])
def test_the_pessimistic_end_holds_what_it_promises(loss, gain):
    generator = np.random.default_rng(3)
    drawn = generator.multinomial(897, [loss, gain, 1 - loss - gain], 300)
    missed = sum(drop(int(b), int(c), 897).high < loss - gain for b, c, _ in drawn)
    assert missed / 300 <= 0.08  # 5 % promised, and three standard errors of 300 trials


def test_scores_that_are_no_counts_are_drawn_in_pairs():
    generator = np.random.default_rng(0)
    before = generator.normal(size=500)
    estimate = drop_of_scores(before, before - 0.1 + generator.normal(scale=0.01, size=500))
    assert estimate.low > 0.098
    assert estimate.high < 0.102
    assert estimate.method == "paired bootstrap"


def test_equal_scores_that_are_no_counts_leave_room_too():
    before = np.linspace(0, 2, 500)
    assert drop_of_scores(before, before).high == pytest.approx(2 * 3 / 500, rel=0.01)


def test_too_few_samples_leave_the_ends_open():
    before = np.linspace(0, 2, 5)
    assert drop_of_scores(before, before).high is None


def logits(count=200, classes=4, seed=0):
    return np.random.default_rng(seed).normal(size=(count, classes)).astype(np.float32)


def test_classification():
    reference = logits()
    labels = reference.argmax(axis=1)
    variant = reference.copy()
    variant[3] = -variant[3]
    got = compare_outputs({"y": reference}, {"y": variant}, labels, find_metric("accuracy"))
    assert got["accuracy"].value == 0.995
    assert got["accuracy_drop"].value == pytest.approx(0.005)
    assert got["flip_rate"].value == 0.005
    assert got["cosine"].value == pytest.approx(1 - 2 / 200)
    assert got["max_abs_error"].value == pytest.approx(2 * np.abs(reference[3]).max(), rel=1e-6)


def test_retrieval_counts_changed_finds_and_only_of_queries():
    vectors = np.eye(6, dtype=np.float32)
    vectors[:3] = vectors[3:] + 0.1
    labels = np.array([3, 4, 5, -1, -1, -1])
    other = vectors.copy()
    other[0] = vectors[4]
    got = compare_outputs({"e": vectors}, {"e": other}, labels, find_metric("recall_at_1"))
    assert got["flip_rate"].value == pytest.approx(1 / 3)
    assert got["accuracy"].runs == 3
    assert got["accuracy_drop"].value == pytest.approx(1 / 3)


def test_f1_has_an_interval_and_leaves_room_for_what_was_not_seen():
    reference = logits()
    labels = reference.argmax(axis=1)
    got = compare_outputs({"y": reference}, {"y": reference.copy()}, labels, find_metric("f1"))
    assert got["accuracy"].value == 1.0
    assert got["accuracy_drop"].value == 0.0
    assert 0.001 < got["accuracy_drop"].high < 0.1


def test_a_metric_of_one_number_has_no_interval():
    metric = Metric(name="mine", unit="1", score=lambda outputs, labels: 0.5)
    got = compare_outputs({"y": logits()}, {"y": logits()}, None, metric)
    assert got["accuracy_drop"].value == 0.0
    assert got["accuracy_drop"].high is None


def test_a_metric_that_scores_nothing_is_refused():
    with pytest.raises(InputError, match="scores none"):
        compare_outputs({"y": logits(3)}, {"y": logits(3)}, np.full(3, -100), find_metric("accuracy"))


def damaged(value):
    array = logits()
    array[7, 1] = value
    return {"y": array}


@pytest.mark.parametrize(
    ("variant", "text"),
    [
        ({"z": logits()}, "its outputs are"),
        ({"y": logits()[:, :3]}, "has shape"),
        (damaged(np.nan), "gives NaN in the output 'y' for 1 of 200 samples, first for sample 7"),
        (damaged(np.inf), "overflows to infinity"),
    ],
)
def test_answers_that_cannot_be_compared(variant, text):
    with pytest.raises(StageError, match=text):
        compare_outputs({"y": logits()}, variant, None, None)


def test_another_model_of_the_same_task_is_judged_by_the_metric_alone():
    reference = logits(classes=3)
    labels = reference.argmax(axis=1)
    wider = np.full((200, 5), -9, np.float32)
    wider[:, :3] = reference
    wider[:2, 4] = 9  # a class that the reference does not know
    drops = {"accuracy": 0.01, "f1": 0.25}
    for metric, expected in drops.items():
        got = compare_outputs({"y": reference}, {"scores": wider}, labels, find_metric(metric), parity=False)
        assert set(got) == {"accuracy", "accuracy_drop", "flip_rate"}
        assert got["flip_rate"].value == 0.01
        assert got["accuracy_drop"].value == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("value", "text"), [(np.nan, "gives NaN"), (-np.inf, "overflows to infinity")])
def test_another_model_may_not_answer_with_what_is_no_number(value, text):
    with pytest.raises(StageError, match=text):
        compare_outputs({"z": logits()}, damaged(value), np.zeros(200, int), find_metric("accuracy"), parity=False)


def test_infinities_that_the_baseline_has_too_are_no_fault():
    got = compare_outputs(damaged(-np.inf), damaged(-np.inf), None, None)
    assert got["cosine"].value == pytest.approx(1.0)
    assert got["max_abs_error"].value == 0.0


# --- label-free ------------------------------------------------------------------------------------------------


def test_without_labels_the_baselines_answers_stand_in():
    reference = logits()
    variant = reference.copy()
    variant[3] = -variant[3]
    got = compare_outputs({"y": reference}, {"y": variant}, None, find_metric("cosine"))
    assert got["accuracy"].value == pytest.approx(1 - 2 / 200)
    assert got["accuracy_drop"].value == pytest.approx(2 / 200)
    assert got["accuracy_drop"].high > 2 / 200
    assert "flip_rate" not in got
    itself = compare_outputs({"y": reference}, {"y": reference}, None, find_metric("cosine"))
    assert itself["accuracy"].value == pytest.approx(1)


def test_labels_that_are_vectors_judge_both_models():
    truth = logits(seed=1)
    got = compare_outputs({"y": logits()}, {"y": truth}, truth, find_metric("cosine"))
    assert got["accuracy"].value == pytest.approx(1)
    assert got["accuracy_drop"].value < -0.5


# --- slices ----------------------------------------------------------------------------------------------------

NAMES = np.array(["day"] * 300 + ["night"] * 100 + ["fog"] * 12)


def sliced(wrong, names=NAMES, metric="accuracy"):
    reference = logits(len(names))
    variant = reference.copy()
    variant[wrong] = -variant[wrong]
    return drop_by_slice({"y": reference}, {"y": variant}, reference.argmax(axis=1), find_metric(metric), names)


def test_the_worst_slice_is_named_and_small_ones_are_not_judged():
    found, notes = sliced(np.r_[0:3, 300:310, 400:412])
    drop = found["slice_drop_max"]
    assert (drop.value, drop.runs) == (0.1, 100)
    assert drop.low < 0.1 < drop.high
    assert "Bonferroni over 2 slices" in drop.method
    assert "'night': +0.1000 over 100 samples" in notes[0]
    assert "1 of 3 slices have fewer than 20 scored samples and are not judged: 'fog'" in notes[1]


def test_the_upper_end_holds_for_every_slice():
    drop = sliced([0])[0]["slice_drop_max"]
    assert drop.value == 1 / 300
    assert drop.high == pytest.approx(exact_bounds(0, 100, comparisons=2)[1], rel=0.01), "night may have lost as much"
    assert drop.high > exact_bounds(0, 100)[1]


def test_the_worst_of_many_slices_is_not_taken_for_the_only_one():
    """Slices that all lost the same: the upper end of the one that looks worst must hold in 95 % of cases."""
    rng, true, missed = np.random.default_rng(5), 0.03, 0
    names = np.repeat(np.arange(10), 60)
    for _ in range(40):
        wrong = np.flatnonzero(rng.random(600) < true)
        missed += sliced(wrong, names)[0]["slice_drop_max"].high < true
    assert missed <= 5  # 5 % promised, and two standard errors of 40 trials


def test_slices_of_a_metric_that_is_no_mean():
    found, notes = sliced(np.r_[300:330], metric="f1")
    assert found["slice_drop_max"].value > 0.2
    assert found["slice_drop_max"].high >= found["slice_drop_max"].value
    assert "'night'" in notes[0]


def test_slices_that_cannot_be_judged():
    found, notes = sliced([0], np.arange(412))
    assert not found
    assert "412 of 412 slices" in notes[0]
    assert notes[0].endswith(", ...")
    metric = Metric(name="mine", unit="1", score=lambda outputs, labels: 0.5)
    found, notes = drop_by_slice({"y": logits()}, {"y": logits()}, None, metric, np.zeros(200, int))
    assert not found
    assert "'mine' is one number" in notes[0]


# --- neighbours ------------------------------------------------------------------------------------------------


def batched(answer, batch_size=8, count=100, metric=None):
    """How answers of ``answer`` (rows -> rows) move in other batches."""
    inputs = logits(count)

    def run(order):
        parts = [answer(inputs[order[i : i + batch_size]]) for i in range(0, len(order), batch_size)]
        return {"y": np.concatenate(parts)[np.argsort(order)]}

    order = np.random.default_rng(0).permutation(count)
    outputs = run(order)
    labels = inputs.argmax(axis=1)
    return batch_dependence(run, outputs, order, labels, metric, batch_size=batch_size, seed=0)


def test_rows_of_their_own_do_not_move():
    found = batched(lambda rows: rows * 2, metric=find_metric("accuracy"))
    assert found["batch_dependence"].value == 0
    assert found["batch_dependence"].runs == 96, "whole batches"
    assert found["batch_flip_rate"].value == 0
    assert found["batch_flip_rate"].high > 0


def test_a_range_taken_over_the_batch_is_found_out():
    def coarse(rows):
        step = np.abs(rows).max() / 3
        return np.rint(rows / step) * step

    found = batched(coarse, metric=find_metric("accuracy"))
    assert found["batch_dependence"].value > 0.05
    assert 0 < found["batch_flip_rate"].value < 1


def test_a_position_that_decides_is_found_out_in_less_than_a_batch():
    found = batched(lambda rows: rows + np.arange(len(rows))[:, None], batch_size=64, count=30)
    assert found["batch_dependence"].value > 0.5
    assert set(found) == {"batch_dependence"}


def test_alone_in_its_batch_an_answer_has_no_neighbours():
    found = batched(lambda rows: rows, batch_size=1)
    assert found["batch_dependence"].method == "exact"


def components(**more):
    given = {"engine_version": "1", "instruction_set": "avx2", "batch_size": 8, "samples_digest": "s"} | more
    return fidelity_components("v", EngineSpec(name="onnxruntime"), **{"metric": "accuracy", **given})


def test_components_name_all_that_matters():
    got = components()
    assert got["engine"] == EngineSpec(name="onnxruntime").key
    assert got["batch_size"] == 8


def test_the_code_of_the_users_metric_matters():
    before, after = (components(metric="mine:score", metric_code={"mine": digest}) for digest in ("1", "2"))
    assert before != after
    assert components(parity=False) != components()
    assert components() == components(metric_code=None) == components(metric_code={})
