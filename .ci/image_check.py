"""`make image-check`: what can be known of the images where no container engine is.

For each target of the Dockerfile its install lines run in a fresh environment, its entry point is started as the image
would start it, and a tiny model is asked for answers, which are held against those computed here. What was not
exercised is said at the end. Nothing of it stays.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tritonclient.grpc
import tritonclient.http

from profiles.serving.core2.folder import model_folder, write_folder
from profiles.serving.session import open_session
from registry.records import Artifact, EngineSpec
from tests.doubles.candidates import candidate
from tests.doubles.image_builder import Builder, Image, parse
from tests.doubles.models import FEATURES, mlp, mlp_answer, write_onnx, write_openvino
from tests.e2e.conftest import CAMPAIGN, LEVELS

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("serve", "job-cpu", "job-gpu")
LIMIT_S = 120.0
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
NOT_TO_SERVE = ("burnish", "mlflow", "nncf", "nvidia-pytriton", "onnx", "scikit-learn", "torch", "transformers")
CORE2 = {
    "MLSERVER_MODELS_DIR": "/mnt/agent/models",
    "MLSERVER_PARALLEL_WORKERS": "1",
    "MLSERVER_LOAD_MODELS_AT_STARTUP": "false",
    "MLSERVER_GRPC_MAX_MESSAGE_LENGTH": "1048576000",
    "MLSERVER_DEBUG": "false",
}
"""What Core 2's ServerConfig gives MLServer's container, beside the ports."""
PASSED_ON = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
"""What belongs to this host's processor: older builds of OpenBLAS compute wrongly on some without it."""
LIST = "import importlib.metadata as m, json; print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"
INFER = """
import sys
import numpy as np
from profiles.serving.session import open_session
import profiles

model, engine, source, target = sys.argv[1:]
session = open_session(model, engine=engine, precision="float32")
np.save(target, session.run({"x": np.load(source)})["logits"])
print(profiles.__file__)
"""


CUDA = """
import json, os
import onnxruntime, torch

print(json.dumps({
    "torch": torch.version.cuda,
    "onnxruntime": onnxruntime.cuda_version,
    "providers": onnxruntime.get_available_providers(),
    "folder": os.path.dirname(onnxruntime.__file__),
}))
"""
DRIVER = {"libcuda.so.1"}
"""What a node's NVIDIA driver brings into the container."""


class ImageError(Exception):
    """An image would not do what it is for."""


@functools.cache
def interpreter() -> Path:
    """An interpreter that the image's user may read, if there is one: then its processes run as that user."""
    minor = f"python3.{sys.version_info.minor}"
    own, system = Path(sys.base_prefix, "bin", minor), Path("/usr/bin", minor)
    if readable(own) or not readable(system):
        return own
    done = subprocess.run([system, "-c", "import ensurepip"], check=False, capture_output=True)
    return own if done.returncode else system


def main() -> None:
    """Checks the targets that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all if none is named")
    names = parser.parse_args().targets or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    # Ctrl-C and SIGTERM end the servers and remove the folder.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    work = Path(tempfile.mkdtemp(prefix="burnish-images-"))
    work.chmod(0o755)
    findings: list[str] = []
    try:
        builder = Builder(
            parse((ROOT / "Dockerfile").read_text(encoding="utf-8")),
            context=ROOT,
            work=work,
            build_arguments={"PIP_EXTRA_INDEX_URL": os.environ.get("PIP_EXTRA_INDEX_URL", "")},
            say=say,
            python=interpreter(),
        )
        for name in names:
            findings += check(name, builder, work)
    except (ImageError, AssertionError, ValueError) as error:
        sys.exit(f"image-check: {error}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say("\nNot exercised, since no image was built:")
    for line in dict.fromkeys(findings):
        say(f"  {line}")


def check(name: str, builder: Builder, work: Path) -> list[str]:
    """Builds the target and uses it; returns what could not be exercised."""
    say(f"\n== {name}")
    started = time.monotonic()
    image = builder.build(name)
    packages = json.loads(run(image, [python(image), "-I", "-c", LIST]))
    size = sum(path.lstat().st_size for path in image.path("/opt").rglob("*"))
    say(f"{len(packages)} packages, {size / 1e6:,.0f} MB, after {time.monotonic() - started:.0f} s")
    check_requirements(name, image)
    before = files_of(image)
    samples = work / f"samples-{name}"
    if name == "serve":
        check_serve(image, packages, samples)
    else:
        check_job(image)
    if strays := sorted(files_of(image) - before):
        raise ImageError(f"{name} wrote where its user may not: {', '.join(map(str, strays[:5]))}")
    left = [f"the base image, in whose place stood {interpreter()} and this host's libraries"]
    if not user_of(image):
        left.append(f"the user {image.user}, in whose place stood the one who ran this")
    if name == "job-gpu":
        check_cuda(image)
        left.append("anything on a GPU")
    return [*left, *(f"RUN {line}" for line in image.left_out)]


def check_requirements(name: str, image: Image) -> None:
    """Holds what is installed against what it requires."""
    done = subprocess.run(
        [python(image), "-m", "pip", "check"], check=False, capture_output=True, text=True, env=environment(image)
    )
    # burnish asks for onnxruntime, in whose place onnxruntime-gpu stands.
    known = "requires onnxruntime, which is not installed" if name == "job-gpu" else "No broken requirements"
    lines = (done.stdout or done.stderr or "nothing").splitlines()
    if any(known not in line for line in lines):
        raise ImageError(f"{name}: pip check says {'; '.join(lines)}")


# --- serve -------------------------------------------------------------------------------------------------------


def check_serve(image: Image, packages: dict[str, str], samples: Path) -> None:
    """Starts the server as Core 2 does, loads a model of each engine as its agent does, and asks by both protocols."""
    if unwanted := [name for name in NOT_TO_SERVE if name in packages]:
        raise ImageError(f"serve has {', '.join(unwanted)}, which no session needs")
    models = image.path(CORE2["MLSERVER_MODELS_DIR"])
    models.mkdir(parents=True)
    features = np.random.default_rng(0).normal(size=(3, FEATURES)).astype(np.float32)
    with served(image) as (http, grpc):
        for engine in ("onnxruntime", "openvino"):
            folder = samples / engine
            artifact = (write_onnx if engine == "onnxruntime" else write_openvino)(mlp(), folder)
            model = f"mlp-{engine}"
            place(artifact, folder, models / model, engine)
            grpc.load_model(model)
            session = open_session(folder / artifact.entry, engine=engine, precision="float32")
            expected = session.run({"x": features})["logits"]
            np.testing.assert_allclose(expected, mlp_answer(features), **CLOSE)
            for protocol, client in (("grpc", grpc), ("rest", http)):
                np.testing.assert_allclose(ask(client, model, features), expected, **CLOSE)
                say(f"{engine} over {protocol}: {len(features)} answers, as in process")
            grpc.unload_model(model)


def place(artifact: Artifact, source: Path, target: Path, engine: Literal["onnxruntime", "openvino"]) -> None:
    """Puts the model's folder where an agent of Core 2 would."""
    asked = candidate(engine=EngineSpec(name=engine, precision="float32"))
    write_folder(model_folder(asked, artifact, model_name=target.name), source, target)


@contextlib.contextmanager
def served(image: Image) -> Iterator[tuple[Any, Any]]:
    """The image's entry point as a server, with a client of each protocol; ended by SIGTERM, as a pod is."""
    ports = free_ports(3)
    names = ("MLSERVER_HTTP_PORT", "MLSERVER_GRPC_PORT", "MLSERVER_METRICS_PORT")
    told = {**CORE2, "MLSERVER_HOST": "127.0.0.1", **dict(zip(names, map(str, ports), strict=True))}
    log = image.root.parent / "server.log"
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            image.command(),
            env=environment(image, told),
            cwd=image.path("."),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **user_of(image),
        )
        stack.callback(kill, process)
        http = stack.enter_context(tritonclient.http.InferenceServerClient(f"127.0.0.1:{ports[0]}"))
        grpc = stack.enter_context(tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{ports[1]}"))
        started = time.monotonic()
        try:
            wait_live(process, http)
            who = f"as user {image.user}" if user_of(image) else "as you"
            say(f"its entry point, {who}, answers after {time.monotonic() - started:.1f} s")
            yield http, grpc
        except Exception as error:
            raise ImageError(
                f"{error}\nthe server's log ends with:\n{log.read_text(errors='replace')[-2000:]}"
            ) from error
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired as error:
            raise ImageError("serve does not end on SIGTERM") from error


def kill(process: subprocess.Popen[bytes]) -> None:
    """Ends the process with its group, in which MLServer's workers are too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_live(process: subprocess.Popen[bytes], client: tritonclient.http.InferenceServerClient) -> None:
    """Returns when the server answers."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            if client.is_server_live():
                return
        time.sleep(0.1)
    raise ImageError("the server does not answer" if process.poll() is None else "the server has ended")


def ask(client: Any, model: str, features: np.ndarray) -> np.ndarray:
    """The server's answer; raw tensors over gRPC, JSON over REST, which is all that MLServer takes there."""
    rest = isinstance(client, tritonclient.http.InferenceServerClient)
    module = tritonclient.http if rest else tritonclient.grpc
    tensor = module.InferInput("x", list(features.shape), "FP32")
    tensor.set_data_from_numpy(features, **({"binary_data": False} if rest else {}))
    outputs = [module.InferRequestedOutput("logits", binary_data=False)] if rest else None
    return client.infer(model, [tensor], outputs=outputs).as_numpy("logits")


# --- job-cpu and job-gpu -----------------------------------------------------------------------------------------


def check_job(image: Image) -> None:
    """Makes variants, runs their sessions, and runs a campaign with both servers, all with the image's entry point."""
    found = json.loads(run(image, image.command("doctor", "--json")))
    absent = [f"{name}: {text}" for name, text in found["engines and tools"].items() if text.startswith("not ")]
    absent += [f"{name}: {text}" for name, text in found["servers"].items() if text.startswith("no")]
    if absent:
        raise ImageError(f"burnish doctor finds {'; '.join(absent)}")
    say("burnish doctor finds every engine and both servers")

    home = image.path(".")
    features = np.random.default_rng(0).normal(size=(900, FEATURES)).astype(np.float32)
    expected = mlp_answer(features)
    write_onnx(mlp(), home)
    for name in ("evaluation", "calibration"):
        np.savez(home / f"{name}.npz", x=features, labels=expected.argmax(axis=1))
    made = json.loads(run(image, image.command("make", "model.onnx", "--variant", "openvino", "--json")))
    made_file = home / made["variants"][0]["path"]
    engines = {"onnxruntime": home / "model.onnx", "openvino": made_file}
    np.save(home / "x.npy", features)
    for engine, model in engines.items():
        where = run(image, [python(image), "-I", "-c", INFER, str(model), engine, "x.npy", "logits.npy"])
        if not Path(where.strip()).is_relative_to(image.root):
            raise ImageError(f"the session is not the image's but {where.strip()}")
        np.testing.assert_allclose(np.load(home / "logits.npy"), expected, **CLOSE)
        say(f"{engine} in process: {len(features)} answers, as computed")

    (home / "campaign.yaml").write_text(CAMPAIGN, encoding="utf-8")
    (home / "levels.yaml").write_text(LEVELS, encoding="utf-8")
    started = time.monotonic()
    told = json.loads(run(image, image.command("run", "campaign.yaml", "--json")))
    if told["selected"] is None:
        raise ImageError(f"burnish run selects nothing: {told['sentence']}")
    say(f"burnish run, with MLServer and Triton: {told['selected']} after {time.monotonic() - started:.0f} s")


def check_cuda(image: Image) -> None:
    """Whether torch and ONNX Runtime are built for one CUDA, whose libraries are found; what needs a GPU is not run."""
    found = json.loads(run(image, [python(image), "-I", "-c", CUDA]))
    if found["torch"] is None or found["torch"].split(".")[0] != found["onnxruntime"].split(".")[0]:
        raise ImageError(f"torch is built for CUDA {found['torch']}, onnxruntime for {found['onnxruntime']}")
    if "CUDAExecutionProvider" not in found["providers"]:
        raise ImageError(f"onnxruntime has only {', '.join(found['providers'])}: another build stands in its place")
    provider = Path(found["folder"], "capi", "libonnxruntime_providers_cuda.so")
    absent = [line.split()[0] for line in run(image, ["ldd", str(provider)]).splitlines() if "not found" in line]
    if others := set(absent) - DRIVER:
        raise ImageError(f"{provider.name} does not find {', '.join(sorted(others))}")
    say(
        f"torch for CUDA {found['torch']}, onnxruntime for {found['onnxruntime']}: all libraries found but the driver's"
    )


# --- shared ------------------------------------------------------------------------------------------------------


def user_of(image: Image) -> dict[str, Any]:
    """The image's user with group 0, as arguments of a process; none where this check may not change its user.

    Nor where the interpreter is one that others cannot read.
    """
    if os.geteuid() != 0 or not readable(interpreter()):
        return {}
    for path in (image.path("."), *image.path(".").rglob("*")):
        os.chown(path, int(image.user or 0), 0, follow_symlinks=False)
    return {"user": int(image.user or 0), "group": 0, "extra_groups": ()}


def readable(path: Path) -> bool:
    """Whether any user may use the file: it, and every folder above it, says so."""
    path = path.resolve()
    return path.exists() and all(one.stat().st_mode & 0o005 == 0o005 for one in (path, *path.parents))


def python(image: Image) -> str:
    """The image's interpreter."""
    return image.on_host("/opt/venv/bin/python")


def environment(image: Image, more: dict[str, str] | None = None) -> dict[str, str]:
    """What a process of the image has: nothing of ours but settings for this host's processor."""
    return {**{key: os.environ[key] for key in PASSED_ON if key in os.environ}, **image.process_environment(more)}


def run(image: Image, command: Sequence[str]) -> str:
    """Runs a command of the image in its working folder; returns what it printed.

    Raises:
        ImageError: it failed, or took too long.
    """
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, cwd=image.path("."), env=environment(image),
            timeout=LIMIT_S, **user_of(image),
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"{' '.join(command[:4])} took more than {LIMIT_S:.0f} s") from error
    if done.returncode:
        raise ImageError(
            f"{' '.join(command[:4])} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}"
        )
    return done.stdout


def files_of(image: Image) -> set[Path]:
    """The image's files but for its user's home, the models that are mounted, and compiled modules."""
    spared = (image.path("/home"), image.path("/mnt"))
    return {
        path
        for path in image.root.rglob("*")
        if path.suffix != ".pyc" and path.name != "__pycache__" and not path.is_relative_to(spared[0])
        and not path.is_relative_to(spared[1])
    }  # fmt: skip


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def say(text: str) -> None:
    """Writes a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
