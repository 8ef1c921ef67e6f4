"""The client of Core 2's scheduler, and candidates served through it, against a double on real connections."""

import datetime
import ipaddress
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from profiles.deploy import core2_scheduler_pb2 as pb
from profiles.deploy import scheduler_channel
from profiles.deploy.core2_candidates import Core2Options
from profiles.deploy.core2_messages import Core2Model, Experiment
from profiles.deploy.scheduler import SchedulerClient
from profiles.deploy.scheduler_channel import SchedulerRefusedError, TlsSettings
from profiles.deploy.scheduler_cluster import OWNER, Core2SchedulerCluster
from profiles.serving.naming import model_name_of
from registry.errors import InputError, ServerDiedError, UnreachableError
from registry.records import Artifact, Candidate, TensorSpec
from registry.store import FolderStore
from tests.doubles.busy import ends_in_vain, until
from tests.doubles.candidates import candidate
from tests.doubles.core2 import LOOPBACK, SchedulerDouble, ServerDouble

pytestmark = pytest.mark.slow

MODEL = Core2Model(name="digits", uri="s3://models/digits", requirements=("mlserver",), memory_bytes=1_000_000)
WAIT_S = 30.0
"""Longest wait for what comes about."""
NEVER_S = 0.15
"""First wait for what does not."""


@pytest.fixture(autouse=True)
def quick_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_channel, "RETRY_PAUSE_S", 0.15)


@pytest.fixture
def double() -> Iterator[SchedulerDouble]:
    with SchedulerDouble() as scheduler:
        yield scheduler


@pytest.fixture
def client(double: SchedulerDouble) -> Iterator[SchedulerClient]:
    with SchedulerClient(LOOPBACK, double.port, timeout_s=WAIT_S) as opened:
        yield opened


def changed(**fields: Any) -> Core2Model:
    told = {name: getattr(MODEL, name) for name in Core2Model.__slots__}
    return Core2Model(**{**told, **fields})


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_model_is_loaded_waited_for_and_unloaded(double: SchedulerDouble, client: SchedulerClient) -> None:
    double.load_s, double.unload_s = 0.1, 600
    double.servers["mlserver"].memory_bytes = 10_000_000
    found = client.wait_for_model(client.load_model(MODEL), timeout_s=WAIT_S)
    assert (found.version, found.state, found.server, found.available_replicas) == (1, "ModelAvailable", "mlserver", 1)
    (server,) = client.server_status()
    assert (server.name, server.free_bytes, server.replicas[0].models) == ("mlserver", 9_000_000, 1)
    client.unload_model("digits")
    assert client.model("digits").state == "ModelTerminating"
    looked = double.methods().count("ModelStatus")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.wait_until_unloaded, "digits", timeout_s=WAIT_S)
        # Once it looks a second time, it has seen the model on its way out.
        until(lambda: waiting.done() or double.methods().count("ModelStatus") > looked + 1)
        assert not waiting.done()
        double.hurry("digits")
        waiting.result()
    assert double.loaded() == []
    assert client.server_status("mlserver")[0].free_bytes == 10_000_000


def test_a_connection_that_takes_its_time_is_waited_for(double: SchedulerDouble, client: SchedulerClient) -> None:
    double.be_far(0.3)
    assert [server.name for server in client.server_status()] == ["mlserver"]


def test_all_models_are_listed(double: SchedulerDouble, client: SchedulerClient) -> None:
    assert client.models() == {}
    double.load("theirs", "s3://theirs", **{OWNER: "other"})
    client.wait_for_model(client.load_model(MODEL), timeout_s=WAIT_S)
    found = client.models()
    assert {name: version.state for name, version in found.items()} == dict.fromkeys(
        ("theirs", "digits"), "ModelAvailable"
    )
    assert found["theirs"].parameters == {OWNER: "other"}


def test_an_unknown_model_has_no_version_and_nothing_to_unload(client: SchedulerClient) -> None:
    assert client.model("nobody") is None
    client.unload_model("nobody")
    client.wait_until_unloaded("nobody", timeout_s=WAIT_S)


@pytest.mark.parametrize("definitions", [True, False])
def test_the_state_of_an_older_version_is_no_success(
    double: SchedulerDouble, client: SchedulerClient, definitions: bool
) -> None:
    double.definitions = definitions
    client.wait_for_model(client.load_model(MODEL), timeout_s=WAIT_S)
    double.stale_answers = 3
    double.load_s = 0.05
    found = client.wait_for_model(client.load_model(changed(uri="s3://models/other")), timeout_s=WAIT_S)
    assert found.version == 2


def test_the_failure_of_an_older_version_is_no_failure(double: SchedulerDouble, client: SchedulerClient) -> None:
    double.failures["s3://models/bad"] = "no"
    with pytest.raises(UnreachableError):
        client.wait_for_model(client.load_model(changed(uri="s3://models/bad")), timeout_s=WAIT_S)
    double.stale_answers = 3
    assert client.wait_for_model(client.load_model(MODEL), timeout_s=WAIT_S).version == 2


def test_the_end_of_a_model_of_the_same_name_is_no_failure(double: SchedulerDouble, client: SchedulerClient) -> None:
    client.wait_for_model(client.load_model(MODEL), timeout_s=WAIT_S)
    client.unload_model("digits")
    double.stale_answers = 3
    assert client.wait_for_model(client.load_model(MODEL), timeout_s=WAIT_S).version == 1


def test_a_status_that_never_changes_is_no_success(double: SchedulerDouble, client: SchedulerClient) -> None:
    client.wait_for_model(client.load_model(MODEL), timeout_s=WAIT_S)
    double.stale_answers = 10_000
    loading = client.load_model(changed(uri="s3://models/other"))
    words = "not available on Core 2 after {limit} s: .* shows nothing of it yet"
    ends_in_vain(lambda limit_s: client.wait_for_model(loading, timeout_s=limit_s), words)


def test_the_same_definition_again_is_there_at_once(double: SchedulerDouble, client: SchedulerClient) -> None:
    for _ in range(2):
        found = client.wait_for_model(client.load_model(MODEL), timeout_s=WAIT_S)
    assert found.version == 1


def test_a_model_that_takes_too_long_is_told_with_its_state(double: SchedulerDouble, client: SchedulerClient) -> None:
    double.load_s = 600
    loading, words = client.load_model(MODEL), "digits is not available .* in the state ModelProgressing"
    ends_in_vain(lambda limit_s: client.wait_for_model(loading, timeout_s=limit_s), words)


def test_a_model_is_available_once_all_its_replicas_are(double: SchedulerDouble, client: SchedulerClient) -> None:
    double.most_replicas = 1
    loading = client.load_model(changed(replicas=2))
    words = "after {limit} s: 1 of its 2 replicas are"
    ends_in_vain(lambda limit_s: client.wait_for_model(loading, timeout_s=limit_s), words)
    double.most_replicas = 2
    assert client.wait_for_model(loading, timeout_s=WAIT_S).available_replicas == 2


def test_no_server_with_the_capability(double: SchedulerDouble, client: SchedulerClient) -> None:
    loading = client.load_model(changed(requirements=("onnx", "gpu")))
    with pytest.raises(UnreachableError, match="cannot schedule digits: Failed to schedule model") as caught:
        client.wait_for_model(loading, timeout_s=WAIT_S)
    assert caught.value.exit_code == 4
    assert "all of these capabilities: onnx, gpu" in (caught.value.hint or "")
    assert "\n" not in caught.value.message


def test_not_enough_memory(double: SchedulerDouble, client: SchedulerClient) -> None:
    loading = client.load_model(changed(memory_bytes=9_000_000_000))
    with pytest.raises(UnreachableError, match="cannot schedule digits") as caught:
        client.wait_for_model(loading, timeout_s=WAIT_S)
    assert caught.value.hint == "It asks for 9000 MB, and the most that is free is 8000 MB, on mlserver."


def test_a_server_that_is_not_there(double: SchedulerDouble, client: SchedulerClient) -> None:
    with pytest.raises(UnreachableError) as caught:
        client.wait_for_model(client.load_model(changed(server="gpu-bench")), timeout_s=WAIT_S)
    assert caught.value.hint == "There is no server 'gpu-bench'; there are: mlserver."
    double.servers["mlserver"].connected = False
    with pytest.raises(UnreachableError) as caught:
        client.wait_for_model(client.load_model(changed(name="second")), timeout_s=WAIT_S)
    assert caught.value.hint == "None of these servers is connected: mlserver."


def test_a_wrong_uri_or_a_model_that_does_not_load(double: SchedulerDouble, client: SchedulerClient) -> None:
    double.failures[MODEL.uri] = "rclone: directory not found\n  at s3"
    with pytest.raises(UnreachableError) as caught:
        client.wait_for_model(client.load_model(MODEL), timeout_s=WAIT_S)
    assert caught.value.message == "Core 2 could not load digits on mlserver: rclone: directory not found at s3"
    assert MODEL.uri in (caught.value.hint or "")


def test_a_model_that_is_unloaded_while_it_loads(double: SchedulerDouble, client: SchedulerClient) -> None:
    double.load_s = 600
    loading = client.load_model(MODEL)
    client.unload_model("digits")
    with pytest.raises(UnreachableError, match="digits was taken away while it loaded: ModelTerminated"):
        client.wait_for_model(loading, timeout_s=WAIT_S)


def test_a_model_that_somebody_else_replaces_while_it_loads(double: SchedulerDouble, client: SchedulerClient) -> None:
    double.load_s = 600
    loading = client.load_model(MODEL)
    double.load("digits", "s3://models/theirs")
    with pytest.raises(UnreachableError, match="somebody else has loaded another model as digits, from s3://models/t"):
        client.wait_for_model(loading, timeout_s=WAIT_S)


def test_a_model_that_cannot_be_unloaded(double: SchedulerDouble, client: SchedulerClient) -> None:
    client.wait_for_model(client.load_model(MODEL), timeout_s=WAIT_S)
    double.unload_failures.add("digits")
    client.unload_model("digits")
    with pytest.raises(UnreachableError, match="could not unload digits: the server does not answer"):
        client.wait_until_unloaded("digits", timeout_s=WAIT_S)


def test_a_model_that_is_not_gone_in_time(double: SchedulerDouble, client: SchedulerClient) -> None:
    client.wait_for_model(client.load_model(MODEL), timeout_s=WAIT_S)
    double.unload_s = 600
    client.unload_model("digits")
    words = "not unloaded .* in the state ModelTerminating"
    ends_in_vain(lambda limit_s: client.wait_until_unloaded("digits", timeout_s=limit_s), words)
    with pytest.raises(SchedulerRefusedError, match=r"refused LoadModel .* in process of deletion") as caught:
        client.load_model(MODEL)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("code", [grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT])
def test_a_name_that_core_2_refuses(double: SchedulerDouble, client: SchedulerClient, code: grpc.StatusCode) -> None:
    double.refusals["LoadModel"] = (code, "Model digits does not have a valid name")
    with pytest.raises(SchedulerRefusedError, match="does not have a valid name") as caught:
        client.load_model(MODEL)
    assert caught.value.exit_code == 2
    with pytest.raises(InputError, match="takes no model named 'digits_int8'"):
        client.load_model(changed(name="digits_int8"))
    assert len(double.calls("LoadModel")) == 1


# --- experiments and pipelines ---------------------------------------------------------------------------------------


def test_an_experiment_is_active_once_its_candidates_are(double: SchedulerDouble, client: SchedulerClient) -> None:
    split = Experiment(name="split", default="a", weights={"a": 90, "b": 10}, mirror=("c", 50))
    double.load("a", "s3://a")
    double.load("b", "s3://b")
    client.start_experiment(split)
    words = "split is not active after {limit} s"
    ends_in_vain(lambda limit_s: client.wait_for_experiment(split, timeout_s=limit_s), words)
    double.load("c", "s3://c")
    assert client.wait_for_experiment(split, timeout_s=WAIT_S).active
    client.stop_experiment("split")
    client.stop_experiment("split")
    stopped = client.experiment("split")
    assert stopped is not None
    assert not stopped.active
    assert client.experiment("none") is None


def test_an_experiment_that_waits_says_for_what(double: SchedulerDouble, client: SchedulerClient) -> None:
    split = Experiment(name="split", weights={"a": 1})
    client.start_experiment(split)
    words = "candidates not ready: a"
    ends_in_vain(lambda limit_s: client.wait_for_experiment(split, timeout_s=limit_s), words)


def test_an_experiment_that_the_scheduler_refuses(double: SchedulerDouble, client: SchedulerClient) -> None:
    client.start_experiment(Experiment(name="one", default="a", weights={"a": 1}))
    with pytest.raises(SchedulerRefusedError, match="default a is already in use by experiment one"):
        client.start_experiment(Experiment(name="two", default="a", weights={"a": 1}))
    double.refusals["StopExperiment"] = (grpc.StatusCode.FAILED_PRECONDITION, "not now")
    double.load("a", "s3://a")
    with pytest.raises(UnreachableError, match="not now"):
        client.stop_experiment("one")


def pipeline(*steps: str) -> pb.Pipeline:
    return pb.Pipeline(name="chain", steps=[pb.PipelineStep(name=step) for step in steps])


def test_a_pipeline_is_ready_once_its_models_are(double: SchedulerDouble, client: SchedulerClient) -> None:
    double.load_s = 0.05
    loading = client.load_pipeline(pipeline("a", "b"))
    double.load("a", "s3://a")
    words = "chain is not ready .* not all of its models are"
    ends_in_vain(lambda limit_s: client.wait_for_pipeline(loading, timeout_s=limit_s), words)
    double.load("b", "s3://b")
    assert client.wait_for_pipeline(loading, timeout_s=WAIT_S).version == 1
    again = client.load_pipeline(pipeline("a"))
    assert client.wait_for_pipeline(again, timeout_s=WAIT_S).version == 2
    client.unload_pipeline("chain", timeout_s=WAIT_S)
    assert client.pipeline("chain").state == "PipelineTerminated"
    client.unload_pipeline("nobody", timeout_s=WAIT_S)
    double.refusals["UnloadPipeline"] = (grpc.StatusCode.FAILED_PRECONDITION, "not now")
    client.load_pipeline(pipeline("a"))
    with pytest.raises(UnreachableError, match="refused UnloadPipeline of chain: not now"):
        client.unload_pipeline("chain", timeout_s=WAIT_S)


def test_a_pipeline_that_fails_says_why(double: SchedulerDouble, client: SchedulerClient) -> None:
    double.failures["chain"] = "no topic"
    with pytest.raises(UnreachableError, match="could not make the pipeline chain: PipelineFailed no topic"):
        client.wait_for_pipeline(client.load_pipeline(pipeline("a")), timeout_s=WAIT_S)
    with pytest.raises(InputError, match="takes no pipeline named"):
        client.load_pipeline(pb.Pipeline(name="my_chain"))


# --- connections -----------------------------------------------------------------------------------------------------

Call = Callable[[SchedulerClient], Any]
CALLS: dict[str, Call] = {
    "ModelStatus": lambda client: client.model("digits"),
    "LoadModel": lambda client: client.load_model(MODEL),
    "UnloadModel": lambda client: client.unload_model("digits"),
    "ServerStatus": lambda client: client.server_status(),
    "StartExperiment": lambda client: client.start_experiment(Experiment(name="x", weights={"digits": 1})),
    "ExperimentStatus": lambda client: client.experiment("x"),
    "StopExperiment": lambda client: client.stop_experiment("x"),
    "LoadPipeline": lambda client: client.load_pipeline(pipeline("digits")),
    "PipelineStatus": lambda client: client.pipeline("chain"),
    "UnloadPipeline": lambda client: client.unload_pipeline("chain", timeout_s=WAIT_S),
}


def prepared(double: SchedulerDouble, client: SchedulerClient) -> None:
    """All that the calls are about is there."""
    double.load("digits", "s3://models/theirs")
    client.start_experiment(Experiment(name="x", weights={"digits": 1}))
    client.load_pipeline(pipeline("digits"))
    double.asked.clear()


@pytest.mark.parametrize("method", CALLS)
def test_a_connection_lost_twice_is_the_end_of_each_call(
    double: SchedulerDouble, client: SchedulerClient, method: str
) -> None:
    prepared(double, client)
    double.lost[method] = 2
    with pytest.raises(UnreachableError, match=rf"cannot be reached for {method} of \w+") as caught:
        CALLS[method](client)
    assert caught.value.exit_code == 4
    assert "\n" not in caught.value.message
    assert double.methods().count(method) == (1 if method == "LoadPipeline" else 2)


@pytest.mark.parametrize("method", [method for method in CALLS if method != "LoadPipeline"])
def test_a_connection_lost_once_is_made_good(double: SchedulerDouble, client: SchedulerClient, method: str) -> None:
    prepared(double, client)
    double.lost[method] = 1
    CALLS[method](client)
    assert double.methods().count(method) >= 2


@pytest.mark.parametrize("method", CALLS)
def test_a_call_that_is_not_answered_in_time(double: SchedulerDouble, client: SchedulerClient, method: str) -> None:
    prepared(double, client)
    double.late_s[method] = 600

    def ask(timeout_s: float) -> None:
        with SchedulerClient(LOOPBACK, double.port, timeout_s=timeout_s) as hasty:
            CALLS[method](hasty)

    ends_in_vain(ask, f"did not answer {method} of", first_s=0.05)


def test_nobody_listens(double: SchedulerDouble, client: SchedulerClient) -> None:
    double.hang_up()
    with pytest.raises(UnreachableError, match="cannot be reached for ModelStatus of digits"):
        client.model("digits")
    with SchedulerClient(LOOPBACK, 1) as nowhere, pytest.raises(UnreachableError, match="refused") as caught:
        nowhere.model("digits")
    assert "ipv4" not in caught.value.message


def test_something_else_listens(double: SchedulerDouble) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port(f"{LOOPBACK}:0")
    server.start()
    with SchedulerClient(LOOPBACK, port) as client, pytest.raises(UnreachableError, match="is no scheduler of Core 2"):
        client.model("digits")
    server.stop(None).wait()


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.PERMISSION_DENIED])
def test_a_scheduler_that_fails_is_quoted(
    double: SchedulerDouble, client: SchedulerClient, code: grpc.StatusCode
) -> None:
    double.refusals["ServerStatus"] = (code, "its own\nwords")
    with pytest.raises(UnreachableError, match=f"failed at ServerStatus of all servers: {code.name}: its own words"):
        client.server_status()
    assert double.methods() == ["ServerStatus"]


# --- TLS -------------------------------------------------------------------------------------------------------------


class Authority:
    """An authority that signs certificates, as PEM files in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.path = self._write(f"{name}.crt", self._sign(self._name, self._key, x509.BasicConstraints(True, None)))

    def issue(self, name: str, *, days: int = 1, host: str = LOOPBACK) -> tuple[Path, Path]:
        """(certificate, key) for a name and an address, valid from ten days ago until ``days`` from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names = x509.SubjectAlternativeName([x509.DNSName(name), x509.IPAddress(ipaddress.ip_address(host))])
        certificate = self._write(f"{name}.crt", self._sign(subject, key, names, days=days))
        return certificate, self._write(
            f"{name}.key",
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )

    def _sign(self, subject: x509.Name, key: Any, extension: Any, *, days: int = 1) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        built = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=10))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(extension, critical=False)
        )
        return built.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _write(self, name: str, content: bytes) -> Path:
        path = self._folder / name
        path.write_bytes(content)
        return path


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "authority")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("stranger"), "stranger")


def secured(authority: Authority, **issued: Any) -> SchedulerDouble:
    """A scheduler with mutual TLS that trusts the authority's clients."""
    certificate, key = (path.read_bytes() for path in authority.issue("seldon-scheduler", **issued))
    pairs, roots = [(key, certificate)], authority.path.read_bytes()
    return SchedulerDouble(credentials=grpc.ssl_server_credentials(pairs, roots, require_client_auth=True))


def settings(authority: Authority, client: Authority | None, **fields: Any) -> TlsSettings:
    certificate, key = client.issue("client") if client is not None else (None, None)
    return TlsSettings(ca=authority.path, certificate=certificate, key=key, **fields)


def ask_over(double: SchedulerDouble, tls: TlsSettings | None) -> tuple[Any, ...]:
    with SchedulerClient(LOOPBACK, double.port, tls=tls, timeout_s=WAIT_S) as client:
        return client.server_status()


def test_mutual_tls(authority: Authority) -> None:
    with secured(authority) as double:
        assert ask_over(double, settings(authority, authority))[0].name == "mlserver"


def test_a_connection_lost_under_tls_is_made_good(authority: Authority) -> None:
    with secured(authority) as double:
        double.lost["ServerStatus"] = 1
        assert ask_over(double, settings(authority, authority))[0].name == "mlserver"


def test_a_certificate_for_another_name(authority: Authority) -> None:
    with secured(authority, host="10.1.2.3") as double:
        with pytest.raises(UnreachableError, match=f"its certificate is not for {LOOPBACK}"):
            ask_over(double, settings(authority, authority))
        assert ask_over(double, settings(authority, authority, server_name="seldon-scheduler"))
        with pytest.raises(UnreachableError, match="its certificate is not for somebody"):
            ask_over(double, settings(authority, authority, server_name="somebody"))


def test_what_is_wrong_with_tls_is_told(authority: Authority, stranger: Authority) -> None:
    with secured(authority) as double:
        with pytest.raises(UnreachableError, match=f"its certificate is not signed by {stranger.path}"):
            ask_over(double, settings(stranger, authority))
        with pytest.raises(UnreachableError, match="not signed by the authorities that gRPC trusts"):
            ask_over(double, TlsSettings())
        with pytest.raises(UnreachableError) as caught:
            ask_over(double, settings(authority, None))
        assert "where the client shows no certificate" in (caught.value.hint or "")
        with pytest.raises(UnreachableError) as caught:
            ask_over(double, settings(authority, stranger))
        assert "where it does not trust" in (caught.value.hint or "")
        with pytest.raises(UnreachableError) as caught:
            ask_over(double, None)
        assert "A TLS port closes connections in plaintext" in (caught.value.hint or "")
        assert double.asked == []


def test_an_expired_certificate(authority: Authority) -> None:
    with secured(authority, days=-1) as double, pytest.raises(UnreachableError, match="certificate has expired"):
        ask_over(double, settings(authority, authority))


def test_tls_to_a_plaintext_port(double: SchedulerDouble, authority: Authority) -> None:
    with pytest.raises(UnreachableError, match="it does not speak TLS"):
        ask_over(double, settings(authority, authority))


def test_files_of_tls_are_checked_before_anything_is_sent(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue("client")
    _, other_key = authority.issue("other")
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("hush")
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    locked = tmp_path / "locked.key"
    secret = serialization.BestAvailableEncryption(b"hush")
    locked.write_bytes(loaded.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret))
    wrong = {
        "only one of them": TlsSettings(certificate=certificate),
        "there is no file": TlsSettings(ca=tmp_path / "none.crt"),
        "holds no certificates": TlsSettings(ca=nonsense),
        "no certificate and its private key": TlsSettings(certificate=certificate, key=other_key),
        "are no certificate": TlsSettings(certificate=nonsense, key=key),
        "the key has a password": TlsSettings(certificate=certificate, key=locked),
    }
    for words, tls in wrong.items():
        with pytest.raises(InputError, match=words) as caught:
            SchedulerClient(LOOPBACK, 1, tls=tls)
        assert "hush" not in str(caught.value)


# --- candidates ------------------------------------------------------------------------------------------------------

TENSOR = TensorSpec(name="x", dtype="float32", shape=("n", 4))


@pytest.fixture
def artifact(tmp_path: Path) -> tuple[Artifact, Path]:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"weights" * 1000)
    store = FolderStore(tmp_path / "store")
    found = store.add(folder, format="onnx", entry="model.onnx", inputs=(TENSOR,), outputs=(TENSOR,))
    return found, store.path(found)


class Shelf:
    """Where artifacts are put: remembers what it was given."""

    def __init__(self) -> None:
        self.put: list[tuple[Artifact, dict[str, bytes]]] = []
        self.names: list[str] = []

    def __call__(self, artifact: Artifact, files: Path) -> str:
        self.names.append(files.name)
        self.put.append((artifact, {file.path: (files / file.path).read_bytes() for file in artifact.files}))
        return f"s3://models/{artifact.digest}"


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def cluster_of(double: SchedulerDouble, client: SchedulerClient, shelf: Shelf, **fields: Any) -> Core2SchedulerCluster:
    requirements = {"burnish": ("mlserver", "python")}
    told = {"mesh": double.mesh, "place": shelf, "owner": "camp", "requirements": requirements, "unload_s": WAIT_S}
    return Core2SchedulerCluster(client, Core2Options(**{**told, **fields}))


Artifacts = tuple[Artifact, Path]


def test_a_candidate_is_served_and_taken_away(
    double: SchedulerDouble, client: SchedulerClient, shelf: Shelf, artifact: Artifacts
) -> None:
    double.load("theirs", "s3://theirs")
    one, two = candidate(), candidate(variant="mlp/int8", max_batch_size=8, max_batch_delay_ms=2.0, protocol="rest")
    with cluster_of(double, client, shelf, servers={"mlserver": "mlserver"}) as cluster:
        first = cluster.deploy(one, *artifact, timeout_s=WAIT_S)
        second = cluster.deploy(two, *artifact, timeout_s=WAIT_S)
        assert double.loaded() == sorted(["theirs", model_name_of(one), model_name_of(two)])
        assert first.target.url == double.mesh
        assert first.target.headers == {"seldon-model": first.target.model}
        assert second.target.protocol == "rest"
        assert first.load_time_s > 0
        usage = first.usage()
        assert usage is not None
        assert usage.instance.startswith("mlserver with 1 replicas since ")
        assert usage == first.usage()
        double.restart(first.target.model)
        restarted = first.usage()
        assert restarted is not None
        assert restarted.instance != usage.instance
        assert (restarted.cpu_s, restarted.rss_mb) == (None, None)
        assert (first.server, first.version) == ("mlserver", 1)
        first.undeploy()
        first.undeploy()
        assert double.loaded() == sorted(["theirs", model_name_of(two)])
        with pytest.raises(ServerDiedError, match="not available on Core 2 any more: ModelTerminated"):
            first.usage()
    assert double.loaded() == ["theirs"]


def test_core_2_is_told_of_the_folder_by_its_digest(
    double: SchedulerDouble, client: SchedulerClient, shelf: Shelf, artifact: Artifacts
) -> None:
    with cluster_of(double, client, shelf) as cluster:
        cluster.deploy(candidate(), *artifact, timeout_s=WAIT_S)
        cluster.deploy(candidate(max_batch_size=8, max_batch_delay_ms=2.0), *artifact, timeout_s=WAIT_S)
    (plain, files), (batched, _) = shelf.put
    assert shelf.names[0] == model_name_of(candidate())
    assert sorted(files) == ["model-settings.json", "model.onnx"]
    assert files["model.onnx"] == b"weights" * 1000
    assert plain.digest != batched.digest
    assert [file.size_bytes for file in plain.files] == [len(files[file.path]) for file in plain.files]
    spec = double.calls("LoadModel")[0].model.modelSpec
    assert spec.uri == f"s3://models/{plain.digest}"
    assert list(spec.requirements) == ["mlserver", "python"]
    assert spec.memoryBytes == 7000
    assert {one.name: one.value for one in spec.parameters} == {OWNER: "camp"}
    assert double.calls("LoadModel")[0].model.deploymentSpec.replicas == 1


def test_a_model_of_somebody_else_is_not_taken_over(
    double: SchedulerDouble, client: SchedulerClient, shelf: Shelf, artifact: Artifacts
) -> None:
    name = model_name_of(candidate())
    double.load(name, "s3://theirs", **{OWNER: "other"})
    with cluster_of(double, client, shelf) as cluster:
        with pytest.raises(InputError, match=f"a model {name} already, which the campaign other loaded"):
            cluster.deploy(candidate(), *artifact, timeout_s=WAIT_S)
        double.definitions = False
        with pytest.raises(InputError, match="which somebody else loaded"):
            cluster.deploy(candidate(), *artifact, timeout_s=WAIT_S)
    assert double.loaded() == [name]
    assert "LoadModel" not in double.methods()
    assert shelf.put == []


def test_what_a_killed_run_left_is_used_and_then_taken_away(
    double: SchedulerDouble, client: SchedulerClient, shelf: Shelf, artifact: Artifacts
) -> None:
    cluster_of(double, client, shelf).deploy(candidate(), *artifact, timeout_s=WAIT_S)
    with cluster_of(double, client, shelf) as cluster:
        assert cluster.deploy(candidate(), *artifact, timeout_s=WAIT_S).version == 1
    assert double.loaded() == []


def test_a_model_that_is_on_its_way_out_is_waited_for(
    double: SchedulerDouble, client: SchedulerClient, shelf: Shelf, artifact: Artifacts
) -> None:
    name = model_name_of(candidate())
    double.load(name, "s3://theirs")
    double.unload_s = 0.1
    client.unload_model(name)
    with cluster_of(double, client, shelf) as cluster:
        cluster.deploy(candidate(), *artifact, timeout_s=WAIT_S)


@pytest.mark.parametrize("failure", ["schedule", "load", "time", "mesh"])
def test_a_candidate_that_does_not_come_about_leaves_nothing(
    double: SchedulerDouble, client: SchedulerClient, shelf: Shelf, artifact: Artifacts, failure: str
) -> None:
    double.load("theirs", "s3://theirs")
    with cluster_of(double, client, shelf) as cluster:
        kept = cluster.deploy(candidate(variant="kept"), *artifact, timeout_s=WAIT_S)
        words = "cannot schedule"
        if failure == "schedule":
            double.servers = {"triton": ServerDouble(frozenset({"triton"}))}
        elif failure == "load":
            words = "could not load .*: broken graph"
            cluster.deploy(candidate(), *artifact, timeout_s=WAIT_S).undeploy()
            double.failures[double.calls("LoadModel")[-1].model.modelSpec.uri] = "broken graph"
        elif failure == "time":
            words, double.load_s = "not available on Core 2 after", 600
        else:
            words, double.mesh_ready = "the mesh at .* does not: status 404", False
        first_s = WAIT_S if failure in {"schedule", "load"} else NEVER_S
        ends_in_vain(lambda limit_s: cluster.deploy(candidate(), *artifact, timeout_s=limit_s), words, first_s=first_s)
        assert double.loaded() == sorted(["theirs", kept.target.model])


def test_ctrl_c_while_it_loads_leaves_nothing(
    double: SchedulerDouble,
    client: SchedulerClient,
    shelf: Shelf,
    artifact: Artifacts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "wait_for_model", interrupted)
    with cluster_of(double, client, shelf) as cluster:
        with pytest.raises(KeyboardInterrupt):
            cluster.deploy(candidate(), *artifact, timeout_s=WAIT_S)
        assert double.methods().count("LoadModel") == 1
        assert double.loaded() == []


def test_a_model_that_somebody_else_replaced_is_told_and_left(
    double: SchedulerDouble,
    client: SchedulerClient,
    shelf: Shelf,
    artifact: Artifacts,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with cluster_of(double, client, shelf) as cluster:
        deployment = cluster.deploy(candidate(), *artifact, timeout_s=WAIT_S)
        name = deployment.target.model
        double.load(name, "s3://theirs")
        with pytest.raises(ServerDiedError, match="it was version 1, and is version 2"):
            deployment.usage()
    assert double.loaded() == [name]
    assert f"{name} on Core 2 is somebody else's by now" in caplog.text


def test_a_scheduler_that_is_gone_ends_nothing_and_what_stays_loaded_is_named(
    double: SchedulerDouble,
    client: SchedulerClient,
    shelf: Shelf,
    artifact: Artifacts,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with cluster_of(double, client, shelf) as cluster:
        deployment = cluster.deploy(candidate(), *artifact, timeout_s=WAIT_S)
        name = deployment.target.model
        double.hang_up()
        assert deployment.usage() is None
    assert f"Whether {name} is still served as it was is not known" in caplog.text
    assert f"{name} may still be loaded on Core 2: Core 2's scheduler at" in caplog.text


def test_workers_that_the_servers_do_not_have_are_refused(
    double: SchedulerDouble, client: SchedulerClient, shelf: Shelf, artifact: Artifacts
) -> None:
    wanted: Candidate = candidate(parallel_workers=2)
    with cluster_of(double, client, shelf) as cluster, pytest.raises(InputError, match="asks for 2 parallel workers"):
        cluster.deploy(wanted, *artifact, timeout_s=WAIT_S)
    with cluster_of(double, client, shelf, workers=2, memory_bytes=lambda *_: 1000) as cluster:
        cluster.deploy(wanted, *artifact, timeout_s=WAIT_S)
    assert double.calls("LoadModel")[0].model.modelSpec.memoryBytes == 500


def test_a_candidate_of_triton_has_its_model_in_a_version_folder(
    double: SchedulerDouble, client: SchedulerClient, shelf: Shelf, artifact: Artifacts
) -> None:
    double.servers["triton"] = ServerDouble(frozenset({"triton", "burnish"}))
    with cluster_of(double, client, shelf) as cluster:
        deployment = cluster.deploy(candidate(server="triton", protocol="rest"), *artifact, timeout_s=WAIT_S)
        assert deployment.target.binary
        assert deployment.server == "triton"
    assert sorted(shelf.put[0][1]) == ["1/model.onnx", "1/model.py", "config.pbtxt"]


def test_a_mesh_that_is_not_there_is_told_before_anything_is_done(
    double: SchedulerDouble, client: SchedulerClient, shelf: Shelf, artifact: Artifacts
) -> None:
    with (
        cluster_of(double, client, shelf, mesh=f"{LOOPBACK}:1") as cluster,
        pytest.raises(UnreachableError, match=f"mesh of Core 2 cannot be reached at {LOOPBACK}:1: Connection refused"),
    ):
        cluster.deploy(candidate(), *artifact, timeout_s=WAIT_S)
    with (
        cluster_of(double, client, shelf, mesh="mesh:http") as cluster,
        pytest.raises(InputError, match="not host:port"),
    ):
        cluster.deploy(candidate(), *artifact, timeout_s=WAIT_S)
    assert shelf.put == []
    assert double.methods() == []


def test_threads_of_the_double_end() -> None:
    before = set(threading.enumerate())
    with SchedulerDouble() as double, SchedulerClient(LOOPBACK, double.port) as client:
        client.server_status()
        assert set(threading.enumerate()) - before
    # What is told to end ends in its own time.
    until(lambda: set(threading.enumerate()) <= before)
