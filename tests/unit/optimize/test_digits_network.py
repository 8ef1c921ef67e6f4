import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the demo's network needs the extra 'torch'", exc_type=ImportError)

from optimize.demo import digits, network  # noqa: E402


def test_one_seed_trains_the_same_bytes_and_leaves_torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "WIDTHS", (16, 16, 16))
    images, labels = digits._digits()
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    first, second, other = (network.train(images[:64], labels[:64], seed) for seed in (0, 0, 1))
    assert _bytes(first) == _bytes(second) != _bytes(other)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_jitter_keeps_shape_and_range() -> None:
    images = torch.from_numpy(digits._digits()[0][:8])
    moved = network._jitter(images)
    assert moved.shape == images.shape
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1 + 1e-6
    assert not torch.equal(moved, images)


@pytest.mark.slow
def test_the_model_reads_97_of_100_held_out_images() -> None:
    model = digits.create_model()
    assert not model.training
    images, labels = digits._digits()
    held_out, _ = digits._split(seed=0)
    with torch.inference_mode():
        logits = model(torch.from_numpy(images[held_out]))["logits"].numpy()
    assert logits.shape == (898, 10)
    assert np.mean(logits.argmax(1) == labels[held_out]) >= 0.97


def _bytes(model: network.ResidualNetwork) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
