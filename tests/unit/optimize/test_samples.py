import io
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimize.samples import array_names, check_fit, from_arrays, load_samples, open_samples
from registry.errors import InputError
from registry.records import TensorSpec

SPECS = (TensorSpec(name="x", dtype="float32", shape=("batch", 3)),)


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_inputs_and_labels_are_told_apart(tmp_path):
    samples = load_samples(write(tmp_path / "s.npz", x=np.ones((4, 3), np.float32), labels=np.arange(4)), SPECS)
    assert list(samples.inputs) == ["x"]
    assert samples.labels.tolist() == [0, 1, 2, 3]
    assert len(samples) == 4


def test_order_of_inputs_is_the_files(tmp_path):
    samples = load_samples(write(tmp_path / "s.npz", b=np.ones(2), a=np.ones(2)))
    assert list(samples.inputs) == ["b", "a"]


@given(st.integers(1, 30), st.integers(1, 12))
def test_batches_hold_every_sample_once_in_order(count, size):
    samples = from_arrays({"x": np.arange(count)})
    batches = list(samples.batches(size))
    assert np.concatenate([batch["x"] for batch in batches]).tolist() == list(range(count))
    assert {len(batch["x"]) for batch in batches[:-1]} <= {size}
    order = np.arange(count)[::-1]
    assert next(samples.batches(size, order=order))["x"][0] == count - 1


def test_digest_follows_content_and_not_order_or_layout():
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    digest = from_arrays({"a": a, "b": a}).digest
    assert from_arrays({"b": a, "a": np.asfortranarray(a)}).digest == digest
    assert from_arrays({"a": a, "b": a + 1}).digest != digest
    assert from_arrays({"a": a, "c": a}).digest != digest
    assert from_arrays({"a": a, "b": a.astype(np.float64)}).digest != digest
    assert from_arrays({"a": a, "b": a}, np.zeros(2)).digest != digest


def test_digest_of_text_and_take():
    samples = from_arrays({"t": np.array(["a", "b", "c"])}, np.arange(3))
    assert len(samples.take(2)) == 2
    assert samples.take(2).labels.tolist() == [0, 1]
    assert samples.take(2).digest != samples.digest


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({}, "empty"),
        ({"x": np.ones((0, 3))}, "empty"),
        ({"x": np.ones((2, 3)), "y": np.ones(3)}, "different lengths"),
        ({"x": np.array(1.0)}, "'x' of the samples is a single value"),
        ({"x": np.array([[1.0], [np.nan]])}, "first in sample 1"),
        ({"x": np.array([[np.inf], [1.0]])}, "first in sample 0"),
    ],
)
def test_samples_that_make_no_sense(arrays, text):
    with pytest.raises(InputError, match=text):
        from_arrays(arrays)


@pytest.mark.parametrize("read", [load_samples, lambda path: open_samples(path).checked()])
@pytest.mark.parametrize(
    ("array", "text"),
    [(np.zeros((0, 2), np.float32), "the samples are empty"), (np.full((3, 2), np.nan, np.float32), "holds NaN")],
)
def test_what_is_wrong_is_said_with_the_name_of_the_file(tmp_path, read, array, text):
    np.savez(tmp_path / "calibration.npz", x=array)
    with pytest.raises(InputError, match=rf"calibration\.npz: .*{text}"):
        read(tmp_path / "calibration.npz")


def test_a_single_label_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="'labels' of the samples is a single value"):
        load_samples(write(tmp_path / "s.npz", x=np.ones((4, 3), np.float32), labels=np.int64(3)))


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"z": np.ones((2, 3), np.float32)}, r"\['z'\], but the model's inputs are \['x'\]"),
        ({"x": np.ones((2, 3))}, "is float64, but the model takes float32"),
        ({"x": np.ones((2, 4), np.float32)}, r"shape \[2, 4\], but the model takes \['batch', 3\]"),
        ({"x": np.ones((2, 3, 1), np.float32)}, "shape"),
    ],
)
def test_samples_that_do_not_fit_the_model(arrays, text):
    with pytest.raises(InputError, match=text):
        check_fit(arrays, SPECS, where="s.npz")


@pytest.mark.parametrize("dtype", ["str", "bfloat16"])
def test_inputs_that_numpy_names_otherwise_get_a_message(dtype):
    specs = (TensorSpec(name="x", dtype=dtype, shape=("batch",)),)
    with pytest.raises(InputError, match=dtype):
        check_fit({"x": np.ones(2, np.float32)}, specs, where="s.npz")


def test_text_fits_text():
    check_fit({"x": np.array(["a", "bc"])}, (TensorSpec(name="x", dtype="str", shape=(None,)),), where="s.npz")


def test_a_batch_that_the_model_fixes_says_nothing_of_the_number_of_samples():
    check_fit({"x": np.ones((7, 3), np.float32)}, (TensorSpec(name="x", dtype="float32", shape=(1, 3)),), where="s")


def test_files_that_are_no_samples(tmp_path):
    with pytest.raises(InputError, match="no samples at"):
        load_samples(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "objects.npz", x=np.array([{"a": 1}], dtype=object))
    for name in ("text.npz", "one.npy", "empty.npz", "objects.npz"):
        with pytest.raises(InputError, match=r"is not an \.npz file of plain arrays"):
            load_samples(tmp_path / name)


def test_a_truncated_file(tmp_path):
    whole = write(tmp_path / "s.npz", x=np.ones((50, 3), np.float32)).read_bytes()
    (tmp_path / "s.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"is not an \.npz"):
        load_samples(tmp_path / "s.npz")


def test_slices_stand_beside_labels(tmp_path):
    groups = np.array(["day", "night", "day", "day"])
    path = write(tmp_path / "s.npz", x=np.ones((4, 3), np.float32), labels=np.arange(4), slices=groups)
    samples = load_samples(path, SPECS)
    assert samples.slices.tolist() == groups.tolist()
    assert samples.take(2).slices.tolist() == ["day", "night"]
    assert array_names(path) == {"x", "labels", "slices"}
    plain = from_arrays({"x": np.ones((4, 3), np.float32)}, np.arange(4))
    assert plain.slices is None
    assert plain.digest != samples.digest


def test_a_damaged_file_names_no_arrays(tmp_path):
    (tmp_path / "s.npz").write_bytes(b"no archive")
    assert array_names(tmp_path / "s.npz") == array_names(tmp_path / "none.npz") == frozenset()


@pytest.mark.parametrize(
    ("slices", "text"),
    [(np.ones(3), "float64"), (np.ones((3, 2), int), "shape \\[3, 2\\]"), (np.ones(2, int), "different lengths")],
)
def test_slices_that_name_no_group_a_sample(slices, text):
    with pytest.raises(InputError, match=text):
        from_arrays({"x": np.ones(3)}, None, slices)


def test_an_array_that_the_file_does_not_hold_is_no_reason_to_take_memory(tmp_path):
    path = tmp_path / "s.npz"
    header = io.BytesIO()
    described = {"descr": "<f4", "fortran_order": False, "shape": (10**13, 3)}
    np.lib.format.write_array_header_1_0(header, described)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header.getvalue())
    with pytest.raises(InputError, match=r"'x\.npy' in it ends before the last sample"):
        load_samples(path, SPECS)


def test_numbers_in_another_order_of_bytes_are_refused(tmp_path):
    path = write(tmp_path / "s.npz", x=np.ones((4, 3), ">f4"))
    for read in (load_samples, open_samples):
        with pytest.raises(InputError, match="input 'x' is >f4, but the model takes float32") as caught:
            read(path, SPECS)
        assert "astype('float32')" in caught.value.hint


def test_more_samples_than_there_is_memory_for_are_told(tmp_path, monkeypatch):
    path = write(tmp_path / "s.npz", x=np.ones((4, 3), np.float32))

    def full(*_, **__):
        raise MemoryError("Unable to allocate 37.3 GiB")

    monkeypatch.setattr(np, "load", full)
    with pytest.raises(InputError, match=r"s\.npz holds more than there is memory for: Unable to allocate 37\.3 GiB"):
        load_samples(path, SPECS)
