import json

import numpy as np
import pytest

from optimize.adaptation import adapt, adapt_calibration, adapt_samples, as_jsonable, describe, from_jsonable
from optimize.recipes import apply_recipe, recipe_from_mapping
from optimize.samples import from_arrays, open_samples
from optimize.testing import samples_for, tiny_conv_net
from registry.errors import InputError
from registry.records import Adaptation


def cast(dtype, **linear):
    return Adaptation(input="x", way="cast", dtype=dtype, **linear)


def resize(*sizes, axes=(2, 3)):
    return Adaptation(input="x", way="resize", axes=axes, sizes=sizes)


def test_without_steps_the_samples_are_the_same():
    x = np.ones((2, 3))
    assert adapt({"x": x}, ())["x"] is x


def test_floats_become_the_nearest_step_and_stay_in_range():
    x = np.array([-3.0, -1.0, 0.0, 0.004, 1.0, 7.0], np.float32)
    made = adapt({"x": x}, (cast("uint8", scale=2 / 255, offset=-1.0),))["x"]
    assert made.dtype == np.uint8
    assert made.tolist() == [0, 0, 128, 128, 255, 255]


def test_whole_numbers_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="'x' of the samples holds values that int32 cannot"):
        adapt({"x": np.array([2**40])}, (cast("int32"),))


def test_a_narrower_float_is_a_cast():
    assert adapt({"x": np.array([0.1], np.float32)}, (cast("float16"),))["x"].dtype == np.float16


def test_steps_follow_one_another():
    steps = (Adaptation(input="x", way="truncate", axes=(1,), sizes=(2,)), cast("int32"))
    made = adapt({"x": np.arange(6).reshape(2, 3), "y": np.ones(2)}, steps)
    assert made["x"].tolist() == [[0, 1], [3, 4]]
    assert made["x"].dtype == np.int32
    assert made["y"].tolist() == [1, 1]


def test_half_the_size_weighs_neighbours_as_a_triangle_does():
    x = np.zeros((1, 1, 8, 8), np.float32)
    x[..., 3] = 1.0
    row = adapt({"x": x}, (resize(8, 4),))["x"][0, 0, 0]
    # The centres of the four new pixels are at 0.5, 2.5, 4.5 and 6.5 of the old ones, the triangle's half width is 2.
    np.testing.assert_allclose(row, [0, 0.375, 0.125, 0], atol=1e-6)


def test_a_resized_image_of_whole_numbers_keeps_its_type_and_range():
    x = np.random.default_rng(0).integers(0, 256, (3, 12, 9, 3)).astype(np.uint8)
    made = adapt({"x": x}, (resize(5, 4, axes=(1, 2)),))["x"]
    assert (made.dtype, made.shape) == (np.uint8, (3, 5, 4, 3))
    flat = adapt({"x": np.full_like(x, 200)}, (resize(5, 4, axes=(1, 2)),))["x"]
    assert (flat == 200).all()


@pytest.mark.parametrize("step", [resize(9, 9), Adaptation(input="x", way="truncate", axes=(5,), sizes=(1,))])
def test_samples_smaller_than_what_is_asked_for_are_refused(step):
    with pytest.raises(InputError, match=r"has shape \[1, 1, 8, 8\]"):
        adapt({"x": np.zeros((1, 1, 8, 8))}, (step,))


def test_a_missing_input_is_named():
    with pytest.raises(InputError, match="no input 'x'"):
        adapt({"y": np.zeros(1)}, (cast("int32"),))


def test_steps_are_told_in_words():
    assert describe(cast("uint8", scale=0.5, offset=-1.0)) == "x: sent as uint8 of (value - -1) / 0.5"
    assert describe(resize(4, 6)) == "x: resized to 4x6"


def test_labels_and_the_digest_stay_those_of_the_samples():
    samples = from_arrays({"x": np.arange(6).reshape(3, 2)}, np.array([0, 1, 2]))
    made = adapt_samples(samples, (cast("int32"),))
    assert made.inputs["x"].dtype == np.int32
    assert (made.digest, made.labels.tolist()) == (samples.digest, [0, 1, 2])
    assert adapt_samples(samples, ()) is samples


def test_calibration_samples_are_adapted_batch_by_batch(tmp_path):
    np.savez(tmp_path / "samples.npz", x=np.arange(12, dtype=np.float32).reshape(6, 2))
    streamed = adapt_calibration(open_samples(tmp_path / "samples.npz"), (cast("float16"),))
    assert streamed.headers["x"].dtype == np.float16
    assert [batch["x"].shape for batch in streamed.batches(4)] == [(4, 2), (2, 2)]


def test_a_child_process_is_given_the_same_steps():
    steps = (cast("uint8", scale=0.5, offset=-1.0), resize(4, 6))
    assert from_jsonable(json.loads(json.dumps(as_jsonable(steps)))) == steps


def test_a_stage_after_one_that_takes_smaller_inputs_is_calibrated_with_such(tmp_path):
    source = tiny_conv_net(tmp_path / "source")
    (tmp_path / "work").mkdir()
    stages = [{"name": "reduce.image_side", "side": 4}, "precision.mixed"]
    made = apply_recipe(
        recipe_from_mapping({"name": "small", "stages": stages}),
        source,
        calibration=samples_for(source.inputs, count=16),
        seed=0,
        threads=1,
        work=tmp_path / "work",
    )
    assert made.inputs[0].shape == ("batch", 3, 4, 4)
    assert made.signature_changed
    assert [(step.way, step.sizes) for step in made.adaptation] == [("resize", (4, 4))]
