"""Steps that engines run in tests and benchmarks: small, and told what to do."""

import os
import time
from pathlib import Path
from typing import Any

from optimize.engines.cores import usable_cores
from optimize.engines.local import Limits, run_in_child
from optimize.engines.port import Place
from registry import codec
from registry.errors import InputError
from registry.records import Artifact, TensorSpec
from registry.shared_store import once
from tests.doubles.small_disk import fill

SPEC = TensorSpec(name="x", dtype="float32", shape=("batch", 3))


def where(place: Place, **arguments: Any) -> dict[str, Any]:
    """What the step was given, and where it runs."""
    return {"pid": os.getpid(), "cpus": list(place.cpus), "scratch": place.scratch.is_dir(), **arguments}


def usable(place: Place) -> list[int]:
    """The CPUs that the step may use."""
    return list(usable_cores())


def read(place: Place, *, file: str) -> str:
    """The text of a file that the task named."""
    return Path(file).read_text()


def refuse(place: Place) -> None:
    raise InputError("the step says no", hint="Ask another one.")


def fail(place: Place) -> None:
    raise ZeroDivisionError("a bug")


def begin_and_wait(place: Place, *, folder: str, mark: str, wait_s: float) -> str:
    """Leaves a mark with its process, waits, and leaves another at its end."""
    path = Path(folder, f"{mark}.{os.getpid()}.{time.monotonic_ns()}")
    path.touch()
    time.sleep(wait_s)
    path.rename(f"{path}.done")
    return mark


def in_child(place: Place, *, seconds: float, timeout_s: float) -> Any:
    """A child that takes its time, within a limit."""
    limits = Limits(timeout_s=timeout_s)
    return run_in_child("tests.doubles.steps:sleep_here", {"seconds": seconds}, limits=limits, python_path=ROOT)


def sleep_here(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def wait_and_store(place: Place, *, number: int, wait_s: float, size_bytes: int) -> str:
    """An artifact of so many bytes, after a while; its digest."""
    time.sleep(wait_s)
    (place.scratch / "model.onnx").write_bytes(numbered(number, size_bytes))
    return place.store.add(place.scratch, format="onnx", entry="model.onnx", inputs=(SPEC,), outputs=(SPEC,)).digest


def make_once(place: Place, *, number: int, wait_s: float, size_bytes: int, log: str) -> str:
    """The digest of an artifact that is made once among all who share the store.

    Each making is noted in a file beside the store: at its begin, and once its result is committed. Most of its time it
    takes after that: whoever is killed then has committed what nobody was told of.
    """

    def note(what: str) -> None:
        with Path(log).open("a", encoding="ascii") as file:
            file.write(f"{what} {number}\n")

    made = False

    def make() -> Artifact:
        nonlocal made
        made = True
        note("begun")
        time.sleep(wait_s / 4)
        (place.scratch / "model.onnx").write_bytes(numbered(number, size_bytes))
        return place.store.add(place.scratch, format="onnx", entry="model.onnx", inputs=(SPEC,), outputs=(SPEC,))

    digest = once(place.store, f"unit{number}", make).digest
    if made:
        note("committed")
        time.sleep(3 * wait_s / 4)
    return digest


def numbered(number: int, size_bytes: int) -> bytes:
    """Bytes that tell units apart."""
    return number.to_bytes(8, "little") * (size_bytes // 8)


def overfill(place: Place, *, library: bool) -> None:
    """A child that writes more than there is room for."""
    arguments = {"folder": str(place.scratch), "library": library}
    run_in_child("tests.doubles.steps:overfill_here", arguments, python_path=ROOT)


def overfill_here(folder: str, library: bool) -> None:
    """Says so as Python does, or as a ``library`` that has words of its own for it."""
    try:
        with Path(folder, "beyond").open("wb") as file:
            while True:
                file.write(bytes(1_000_000))
    except OSError:
        if library:
            raise RuntimeError("could not write the model") from None
        raise


def fill_and_answer(disk: str) -> str:
    """An answer that there is no room for."""
    fill(Path(disk))
    return "x" * 100_000


def answer(place: Place, *, record: Any) -> Any:
    """The record, read and written once."""
    return codec.to_jsonable(codec.from_jsonable(TensorSpec, record))


ROOT = Path(__file__).parents[2]
