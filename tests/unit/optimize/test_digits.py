from pathlib import Path

import numpy as np
import pytest

from optimize.demo import digits
from optimize.samples import Samples, load_samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "data"
    digits.write_samples(folder)
    return folder


def test_the_samples_are_enlarged_images_with_their_labels(folder: Path) -> None:
    for name, count in (("evaluation", 898), ("calibration", 256)):
        samples = load_samples(folder / f"{name}.npz")
        image, labels = samples.inputs["image"], samples.labels
        assert labels is not None
        assert (image.dtype, image.shape) == (np.dtype("float32"), (count, 1, 32, 32))
        assert (image.min(), image.max()) == (0, 1)
        assert (labels.dtype, labels.shape) == (np.dtype("int64"), (count,))
        assert set(np.bincount(labels, minlength=10) > count / 15) == {True}


def test_no_image_is_held_out_and_learned_from(folder: Path) -> None:
    held_out, learned = digits._split(seed=0)
    assert sorted([*held_out, *learned]) == list(range(1797))
    evaluation, calibration = (load_samples(folder / f"{name}.npz") for name in ("evaluation", "calibration"))
    assert _rows(evaluation).isdisjoint(_rows(calibration))


def test_an_enlarged_image_keeps_the_mean_of_the_small_one() -> None:
    from sklearn.datasets import load_digits

    images, labels = digits._digits()
    small = load_digits()
    np.testing.assert_allclose(images.mean((1, 2, 3)), small.images.mean((1, 2)) / 16, atol=0.02)
    np.testing.assert_array_equal(labels, small.target)


def test_samples_that_are_there_are_left_alone_and_torn_ones_mended(folder: Path, tmp_path: Path) -> None:
    digits.write_samples(tmp_path)
    whole = (tmp_path / "evaluation.npz").read_bytes()
    before = (tmp_path / "calibration.npz").stat()
    (tmp_path / "evaluation.npz").write_bytes(whole[:1000])
    digits.write_samples(tmp_path)
    after = (tmp_path / "calibration.npz").stat()
    assert (tmp_path / "evaluation.npz").read_bytes() == whole == (folder / "evaluation.npz").read_bytes()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.npz", "evaluation.npz"]


def test_another_seed_splits_otherwise() -> None:
    assert set(digits._split(seed=0)[0]) != set(digits._split(seed=1)[0])


def _rows(samples: Samples) -> set[bytes]:
    return {row.tobytes() for row in samples.inputs["image"]}
