import numpy as np

from optimize.rebuild import unlike_answers

ANSWERS = np.arange(12, dtype=np.float32).reshape(4, 3)


def test_the_same_numbers_are_alike():
    assert unlike_answers({"y": ANSWERS}, {"y": ANSWERS.copy()}) == []


def test_each_output_that_differs_is_named():
    other = ANSWERS.copy()
    other[1, 2] += 1e-6
    other[3] = 0
    told = unlike_answers({"y": other, "z": ANSWERS}, {"y": ANSWERS, "z": ANSWERS[:2]})
    assert told == [
        "its output y differs from the original's for 2 of 4 samples",
        "its output z has the shape (4, 3), the original's (2, 3)",
    ]
    assert unlike_answers({"x": ANSWERS}, {"y": ANSWERS}) == ["its outputs are ['x'], the original's ['y']"]
