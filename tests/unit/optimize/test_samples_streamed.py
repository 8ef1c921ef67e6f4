import random
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimize.samples import StreamedSamples, batches_of, check_fit, load_samples, open_samples
from registry.errors import InputError
from registry.records import TensorSpec

SAVERS = pytest.mark.parametrize("save", [np.savez, np.savez_compressed])


def arrays(count=7):
    random_ = np.random.default_rng(0)
    image = random_.standard_normal((count, 3, 4)).astype(np.float32)
    return {
        "image": image,
        "columns": np.asfortranarray(image),
        "ids": random_.integers(0, 9, (count, 2)),
        "text": np.array([f"number {place}" for place in range(count)]),
        "labels": np.arange(count),
        "slices": np.array(["a", "b"] * count)[:count],
    }


@SAVERS
def test_the_file_is_the_mapping_that_load_samples_gives(tmp_path, save):
    save(tmp_path / "s.npz", **arrays())
    streamed, loaded = open_samples(tmp_path / "s.npz"), load_samples(tmp_path / "s.npz")
    assert list(streamed) == list(loaded.inputs) == ["image", "columns", "ids", "text"]
    assert len(streamed) == 4
    assert streamed.count == len(loaded) == 7
    assert streamed.digest == loaded.digest
    for name, array in loaded.inputs.items():
        np.testing.assert_array_equal(streamed[name], array)
        assert streamed[name].dtype == array.dtype
    with pytest.raises(KeyError):
        streamed["labels"]


@SAVERS
@given(count=st.integers(1, 20), size=st.integers(1, 25))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batches_hold_every_sample_once_in_order_and_in_step(tmp_path, save, count, size):
    given_ = arrays(count)
    save(tmp_path / "s.npz", **given_)
    batches = list(open_samples(tmp_path / "s.npz").batches(size))
    assert [len(batch["ids"]) for batch in batches] == [size] * (count // size) + [count % size] * (count % size > 0)
    for name in ("image", "columns", "ids", "text"):
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in batches]), given_[name])
        assert all(batch[name].flags.c_contiguous and batch[name].flags.writeable for batch in batches)


def test_it_can_be_read_again_and_given_up_half_way(tmp_path):
    np.savez(tmp_path / "s.npz", **arrays())
    samples = open_samples(tmp_path / "s.npz")
    next(samples.batches(2))
    assert len(list(samples.batches(2))) == len(list(batches_of(samples, 2))) == 4


def test_nothing_of_an_array_is_read_before_it_is_asked_for(tmp_path):
    path = tmp_path / "s.npz"
    np.savez(path, x=np.zeros((1000, 256), np.float32))
    content = bytearray(path.read_bytes())
    content[1_000_000] ^= 1
    path.write_bytes(content)
    batches = open_samples(path).batches(10)
    assert len([next(batches) for _ in range(90)]) == 90
    with pytest.raises(InputError, match="Bad CRC-32"):
        list(batches)


@SAVERS
def test_a_value_that_is_not_finite_is_found_with_its_sample(tmp_path, save):
    x = np.ones((9, 2), np.float32)
    x[7, 1] = np.nan
    save(tmp_path / "s.npz", ids=np.ones(9), x=x)
    samples = open_samples(tmp_path / "s.npz")
    text = "input 'x' of the samples holds NaN or an infinity, first in sample 7"
    for read in (lambda: list(samples.batches(2)), samples.checked, lambda: load_samples(tmp_path / "s.npz")):
        with pytest.raises(InputError, match=text):
            read()


def test_labels_may_be_nan(tmp_path):
    np.savez(tmp_path / "s.npz", x=np.ones(2), labels=np.array([1.0, np.nan]))
    samples = open_samples(tmp_path / "s.npz")
    assert samples.checked().digest == load_samples(tmp_path / "s.npz").digest


@pytest.mark.parametrize("read", [open_samples, load_samples])
@pytest.mark.parametrize(
    ("given_", "text"),
    [
        ({}, "the samples are empty"),
        ({"x": np.ones((0, 3))}, "the samples are empty"),
        ({"labels": np.ones(3)}, "the samples are empty"),
        ({"x": np.ones((2, 3)), "y": np.ones(3)}, "different lengths"),
        ({"x": np.ones((2, 3)), "labels": np.ones(3)}, "different lengths"),
        ({"x": np.array(1.0)}, "'x' of the samples is a single value"),
        ({"x": np.array([{"a": 1}], dtype=object)}, r"is not an \.npz file of plain arrays"),
        ({"x": np.ones(2), "slices": np.ones(2)}, "whole numbers or text"),
    ],
)
def test_what_makes_no_sense_is_refused_in_the_same_words(tmp_path, read, given_, text):
    np.savez(tmp_path / "s.npz", **given_)
    with pytest.raises(InputError) as caught:
        read(tmp_path / "s.npz")
    assert caught.match(text) or text in (caught.value.hint or "")


@pytest.mark.parametrize("read", [open_samples, load_samples])
def test_files_that_are_no_samples(tmp_path, read):
    with pytest.raises(InputError, match="no samples at"):
        read(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "one.npy", np.ones(3))
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    for name in ("text.npz", "one.npy", "other.npz"):
        with pytest.raises(InputError, match=r"is not an \.npz file of plain arrays"):
            read(tmp_path / name)


@SAVERS
def test_no_damage_is_more_than_a_message(tmp_path, save):
    save(tmp_path / "s.npz", x=np.ones((6, 3), np.float32), labels=np.arange(6))
    whole = (tmp_path / "s.npz").read_bytes()
    chance = random.Random(5)
    refused = 0
    for _ in range(60):
        content = bytearray(whole)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        (tmp_path / "s.npz").write_bytes(content[: chance.choice([len(content), chance.randrange(len(content))])])
        try:
            list(open_samples(tmp_path / "s.npz").batches(4))
        except InputError:
            refused += 1
    assert refused > 30


def test_an_array_that_says_it_is_larger_than_it_is(tmp_path):
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive, archive.open("x.npy", "w") as member:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**9, 3)}
        np.lib.format.write_array_header_1_0(member, header)
        member.write(bytes(100))
    with pytest.raises(InputError, match=r"'x\.npy' in it ends before the last sample"):
        open_samples(tmp_path / "s.npz")


def test_a_file_that_changes_under_way(tmp_path):
    np.savez(tmp_path / "s.npz", x=np.ones((4, 3)))
    samples = open_samples(tmp_path / "s.npz")
    np.savez(tmp_path / "s.npz", x=np.ones((4, 2)))
    with pytest.raises(InputError, match="changed while it was in use"):
        list(samples.batches(2))
    (tmp_path / "s.npz").unlink()
    with pytest.raises(InputError, match="No such file"):
        list(samples.batches(2))


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.ones((2, 3)), "is float64, but the model takes float32"),
        (np.ones((2, 4), np.float32), r"shape \[2, 4\], but the model takes \['batch', 3\]"),
    ],
)
def test_what_does_not_fit_the_model_is_told_by_the_headers(tmp_path, array, text):
    specs = (TensorSpec(name="x", dtype="float32", shape=("batch", 3)),)
    np.savez(tmp_path / "s.npz", x=array)
    with pytest.raises(InputError, match=text):
        open_samples(tmp_path / "s.npz", specs)
    with pytest.raises(InputError, match=text):
        check_fit(open_samples(tmp_path / "s.npz"), specs, where="s.npz")
    np.savez(tmp_path / "s.npz", x=np.ones((2, 3), np.float32))
    assert isinstance(open_samples(tmp_path / "s.npz", specs), StreamedSamples)


def test_samples_go_through_a_function_batch_by_batch(tmp_path):
    np.savez(tmp_path / "s.npz", x=np.arange(10, dtype=np.float32).reshape(5, 2))
    sizes = []

    def halve(batch):
        sizes.append(len(batch["x"]))
        return {"x": batch["x"][:, :1].astype(np.int64)}

    samples = open_samples(tmp_path / "s.npz").through(halve)
    assert samples.headers["x"].shape == (5, 1)
    assert samples.headers["x"].dtype == np.int64
    assert [batch["x"].ravel().tolist() for batch in samples.batches(2)] == [[0, 2], [4, 6], [8]]
    assert sizes == [1, 2, 2, 1]
    assert samples["x"].ravel().tolist() == [0, 2, 4, 6, 8]
