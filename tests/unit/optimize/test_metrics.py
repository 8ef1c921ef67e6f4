import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from optimize.metrics import BUILT_IN, find_metric
from registry.errors import InputError


def score(name, outputs, labels):
    return find_metric(name).score({"out": np.asarray(outputs, np.float32)}, None if labels is None else labels)


def test_accuracy_is_per_sample():
    got = score("accuracy", [[1, 2], [3, 0], [0, 1]], np.array([1, 0, 0]))
    assert got.tolist() == [1.0, 1.0, 0.0]


def test_ignored_labels_are_not_scored():
    outputs = np.zeros((2, 3, 2))
    outputs[:, :, 1] = 1
    got = score("accuracy", outputs, np.array([[1, 0, -100], [-100, -100, -100]]))
    assert got[0] == 0.5
    assert np.isnan(got[1])


def test_top5():
    outputs = np.tile(np.arange(10.0), (2, 1))
    assert score("top5", outputs, np.array([5, 4])).tolist() == [1.0, 0.0]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_f1_is_scikit_learns_macro_f1(pairs):
    predicted, true = map(np.array, zip(*pairs, strict=True))
    expected = f1_score(true, predicted, average="macro")
    assert score("f1", np.eye(4)[predicted], true) == pytest.approx(expected)


def test_mse_is_larger_where_better():
    assert score("mse", [[1.0, 2.0], [0.0, 0.0]], np.array([[1.0, 2.0], [0.0, 2.0]])).tolist() == [0.0, -2.0]


def test_recall_looks_among_matches_and_corpus_only():
    # Row 1 is nearest to row 0, but a query that nobody looks for; row 2 is the match, row 3 in the corpus.
    vectors = [[1, 0, 0], [1, 0.01, 0], [1, 1, 0], [0, 0, 1], [0, 0.1, 1]]
    got = score("recall_at_1", vectors, np.array([2, 3, -1, -1, 3]))
    assert got[[0, 1, 4]].tolist() == [1.0, 0.0, 1.0]
    assert np.isnan(got[[2, 3]]).all()


def test_recall_does_not_find_itself_and_survives_zero_vectors():
    vectors = [[1, 0], [1, 0.5], [0, 0]]
    assert score("recall_at_1", vectors, np.array([1, 0, -1])).tolist()[:2] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "outputs", "labels", "text"),
    [
        ("accuracy", np.ones((3, 2)), None, "needs labels"),
        ("accuracy", np.ones(3), np.zeros(3, int), "shape \\[3\\]"),
        ("accuracy", np.ones((3, 2)), np.zeros(3), "float64"),
        ("accuracy", np.ones((3, 2)), np.array([0, 1, 2]), "2 classes"),
        ("top5", np.ones((3, 2)), np.zeros((3, 2), int), "'top5'"),
        ("mse", np.ones((3, 2)), np.zeros(3), "'mse'"),
        ("recall_at_1", np.ones((3, 2)), np.array([1, 7, -1]), "from 0 to 2"),
        ("recall_at_1", np.ones((3, 2)), np.array([0, 1, -1]), "other rows"),
        ("recall_at_1", np.ones((3, 2, 2)), np.array([1, -1, -1]), "shape \\[3, 2, 2\\]"),
    ],
)
def test_a_metric_that_cannot_be_given_names_itself_and_why(name, outputs, labels, text):
    with pytest.raises(InputError, match=text):
        score(name, outputs, labels)


def test_top_k():
    outputs = np.tile(np.arange(4.0), (3, 1))
    labels = np.array([3, 2, 0])
    assert score("top1", outputs, labels).tolist() == score("accuracy", outputs, labels).tolist() == [1, 0, 0]
    assert score("top2", outputs, labels).tolist() == [1, 1, 0]
    assert score("top100", outputs, labels).tolist() == [1, 1, 1]


def test_recall_at_k_is_that_of_a_plain_loop():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 3))
    labels = np.where(np.arange(40) < 25, rng.integers(25, 40, 40), -1)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    corpus = np.flatnonzero(labels == -1)
    for k in (1, 2, 5, 15, 100):
        nearest = corpus[np.argsort(-(unit @ unit[corpus].T), axis=1)][:, :k]
        expected = (nearest == labels[:, None]).any(axis=1)[:25]
        assert score(f"recall_at_{k}", vectors, labels)[:25].tolist() == expected.tolist()
        assert np.isnan(score(f"recall_at_{k}", vectors, labels)[25:]).all()


def test_recall_never_finds_the_query_however_large_k_is():
    vectors = [[1, 0], [0.9, 0.1], [0, 1]]
    decided = find_metric("recall_at_3").decide
    assert score("recall_at_3", vectors, np.array([1, 0, -1])).tolist()[:2] == [1.0, 1.0]
    assert decided({"e": np.array(vectors)}, np.array([1, 0, -1])).tolist() == [1, 0, -1]


def test_cosine_with_vectors_as_labels():
    got = score("cosine", [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], np.array([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))
    assert got == pytest.approx([1, np.sqrt(0.5), 1])
    with pytest.raises(InputError, match="'cosine' cannot be given"):
        score("cosine", np.ones((3, 2)), np.ones((3, 4)))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("acuracy", "accuracy"), ("top-1", "top1"), ("Top 5", "top5"), ("recall@10", "recall_at_10"), ("F-1", "f1"),
        ("recall_at_101", "recall_at_100"), ("recal_at_3", "recall_at_3"), ("cosine_similarity", "cosine"),
        ("recall_at_05", "recall_at_5"), ("MSE", "mse"),
    ],
)  # fmt: skip
def test_unknown_metric_names_the_nearest(name, meant):
    with pytest.raises(InputError) as caught:
        find_metric(name)
    assert f"Did you mean {meant!r}?" in caught.value.hint


@pytest.mark.parametrize("name", ["precision", "top0", "recall_at_0", "recall_at_1000", ""])
def test_unknown_metric_lists_what_there_is(name):
    with pytest.raises(InputError) as caught:
        find_metric(name)
    assert "recall_at_<1 to 100>" in caught.value.hint


def own_metric(outputs, labels):
    return (outputs["out"].sum(axis=1) > labels).astype(float)


def own_number(outputs, labels):
    return 0.25


def own_fault(outputs, labels):
    raise KeyError("logits")


def own_misfit(outputs, labels):
    return np.ones(7)


@pytest.fixture
def mine(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "metrics_of_mine", sys.modules[__name__])
    return "metrics_of_mine"


def test_users_metric(mine):
    assert score(f"{mine}:own_metric", np.ones((2, 3)), np.array([2, 3])).tolist() == [1.0, 0.0]
    assert score(f"{mine}:own_number", np.ones((2, 3)), None) == 0.25


@pytest.mark.parametrize(("name", "text"), [("own_fault", "raised KeyError"), ("own_misfit", "shape \\[7\\]")])
def test_users_metric_that_fails(mine, name, text):
    with pytest.raises(InputError, match=text):
        score(f"{mine}:{name}", np.ones((2, 3)), None)


def test_every_built_in_is_found_by_its_name():
    assert all(find_metric(name) is metric for name, metric in BUILT_IN.items())


def test_scores_of_unsigned_bytes_are_ranked_by_their_values():
    outputs = {"out": np.array([[0, 10, 200, 30, 40, 50, 60]], np.uint8)}
    assert [find_metric("top5").score(outputs, np.array([label])).item() for label in (2, 0, 1)] == [1.0, 0.0, 0.0]


def test_recall_of_float16_vectors_whose_squares_float16_cannot_hold():
    vectors = np.random.default_rng(0).normal(0, 300, (12, 16)).astype(np.float16)
    vectors[6:] = vectors[:6]
    labels = np.concatenate([np.arange(6, 12), np.full(6, -1)])
    assert find_metric("recall_at_1").score({"out": vectors}, labels)[:6].tolist() == [1.0] * 6
