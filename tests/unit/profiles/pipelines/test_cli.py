"""``burnish pipeline`` on a plan and on what was measured of it; nothing is served."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from optimize.cli import main
from optimize.pipeline_sources import ChosenPart
from optimize.pipelines import Truth, choice_lines, judge
from profiles.pipelines.choice import Combination, Shortlist
from profiles.pipelines.graph import Gathering, Pipeline, Source, Step
from profiles.pipelines.measured import Measured, write_measured
from registry.documents import load_document
from registry.records import Estimate, exact
from tests.doubles.pipelines import numbers

PLAN = """
name: p
steps:
- {name: a, inputs: [p.inputs.x]}
- {name: b, inputs: [a.outputs.y], tensorMap: {a.outputs.y: x}}
output: {steps: [b]}
"""


@pytest.fixture
def burnish(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs ``burnish pipeline`` in a folder with a plan and measurements; gives (exit code, stdout, stderr)."""
    (tmp_path / "plan.yaml").write_text(PLAN)
    steps = {
        "a": {"fp32": numbers(5.0, memory_mb=200.0), "int8": numbers(3.0, memory_mb=120.0, accuracy_drop=0.01)},
        "b": {"fp32": numbers(20.0, memory_mb=300.0), "int8": numbers(8.0, memory_mb=180.0, accuracy_drop=0.02)},
    }
    write_measured(Measured(steps=steps), tmp_path / "m.yaml")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["burnish", "pipeline", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def test_analyse_tells_the_bottleneck_and_draws(burnish, tmp_path: Path):
    code, out, _ = burnish("analyse", "plan.yaml", "--measured", "m.yaml", "--rate", "20", "--picture", "p.svg")
    assert code == 0
    words = " ".join(out.split())
    assert "p saturates at 50 requests a second, at b" in words
    assert "a: int8 alone does 1.67 times the rate" in words
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")
    code, out, _ = burnish("analyse", "plan.yaml", "--measured", "m.yaml", "--variant", "b=int8", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["analysis"]["limits"][0] == {"what": "b", "rate_rps": 125.0, "visits": 1.0}
    # Gains are over the variants that were named, not over the first ones.
    assert {(one["step"], one["variant"]): one["saturation_rps"] for one in found["gains"]} == {
        ("a", "int8"): [125.0, 125.0], ("b", "fp32"): [125.0, 50.0],
    }  # fmt: skip


def test_choose_lists_the_best_or_the_closest_miss(burnish):
    budget = ("--accuracy-drop", "0.025")
    code, out, _ = burnish("choose", "plan.yaml", "--measured", "m.yaml", "--rate", "20", *budget, "--json")
    shortlist = json.loads(out)["shortlist"]
    assert code == 0
    assert shortlist["combinations"][0]["variants"] == {"a": "fp32", "b": "int8"}
    code, out, _ = burnish("choose", "plan.yaml", "--measured", "m.yaml", "--rate", "40", "--p99-ms", "30")
    assert code == 0
    assert "1. a=int8, b=int8\n" in out
    assert "3. a=int8, b=fp32 (not certainly within the limits)" in out
    code, out, _ = burnish("choose", "plan.yaml", "--measured", "m.yaml", "--p99-ms", "1")
    assert code == 3
    assert "None of them keeps the limits for certain" in out
    code, out, _ = burnish("choose", "plan.yaml", "--measured", "m.yaml", "--memory-mb", "100")
    assert code == 3
    assert "Closest: a=int8, b=int8\n  memory_mb 300, and the limit is 100" in out


def test_what_time_did_not_suffice_to_decide_is_not_said_to_be_impossible():
    nothing = Shortlist(objective="latency_ms", combinations=(), bound=None, relaxed=None, exact=True)
    assert choice_lines(nothing, ()) == ["No combination meets the budget."]
    assert "time ran out before it was known" in choice_lines(replace(nothing, exact=False), ())[0]


def test_a_drop_is_held_against_its_limit_by_the_worse_end_of_its_interval():
    step = Step(name="a", inputs=Gathering(sources=(Source(step=None, side="inputs"),)))
    p = Pipeline(name="p", steps=(step,), output=None)
    one = Combination(variants={"a": "int8"}, surrogate={})
    none = Shortlist(objective="latency_ms", combinations=(one,), bound=None, relaxed=None, exact=True)

    def kept(high: float | None) -> bool:
        drop = Estimate(value=0.0, low=0.0, high=high, runs=100, method="told", unit="fraction")
        truth = Truth(combination=one, accuracy=exact(1.0, "fraction"), accuracy_drop=drop, samples=100)
        told = judge(p, Measured(steps={}), none, [truth], rate_rps=1, replicas={}, accuracy_drop=0.01, p99_ms=None)
        return told[0].kept

    assert (kept(0.03), kept(0.01), kept(None)) == (False, True, False)


def test_balance_counts_replicas(burnish):
    code, out, err = burnish("balance", "plan.yaml", "--measured", "m.yaml", "--rate", "100")
    assert code == 0
    assert "b                        3 x 1 workers, busy 67%" in out
    assert err == ""


def test_size_writes_two_patches(burnish, tmp_path: Path):
    code, out, _ = burnish("size", "plan.yaml", "--measured", "m.yaml", "--rate", "5000", "--out", "patches", "--json")
    assert code == 0
    assert json.loads(out)["sizing"]["partitions"] == 2
    assert sorted(path.name for path in (tmp_path / "patches").iterdir()) == ["seldonconfig.yaml", "seldonruntime.yaml"]
    assert burnish("size", "plan.yaml", "--measured", "m.yaml", "--rate", "5", "--core2-version", "9")[0] == 2


def test_promote_writes_the_manifests_in_order(burnish, tmp_path: Path):
    (tmp_path / "p.yaml").write_text(
        "apiVersion: mlops.seldon.io/v1alpha1\nkind: Pipeline\nmetadata: {name: p}\n"
        "spec: {steps: [{name: a}, {name: b, inputs: [a]}], output: {steps: [b]}}\n"
    )
    (tmp_path / "cluster.yaml").write_text(
        "cluster: {kind: scheduler, address: 'here:9004', mesh: 'here:80', storage: models, storage_uri: /mnt/models}"
    )
    code, out, _ = burnish("promote", "p.yaml", "--model", "b=b-int8", "--weights", "20,100", "--out", "promotion")
    assert code == 0
    assert [Path(line).name for line in out.splitlines()] == [
        "0-way-back.yaml", "1-challenger.yaml", "2-mirror.yaml", "3-share-20.yaml", "4-promoted.yaml",
    ]  # fmt: skip
    assert "name: b-int8" in (tmp_path / "promotion" / "4-promoted.yaml").read_text()
    for wrong, says in (
        (("--model", "b"), "--model 'b' is not step=Model"),
        (("--model", "b=x", "--apply"), "--out goes with --model alone"),
        (("--model", "b=x", "--model", "b=y"), "names a step twice"),
        (("--model", "b=x", "--limit", "latency_p99 <= 4"), "latency_p99"),
        (("--model", "b=x", "--weights", "ten"), "the weights are 'ten'"),
        (("--model", "b=a"), "is another step's"),
        ((), "nothing of the pipeline changes"),
    ):
        code, _, err = burnish("promote", "p.yaml", "--out", "o", *wrong)
        assert code == 2
        assert says in err
    for wrong, says in (
        (("--model", "b=x"), "a pipeline is promoted on a Core 2, and none is named"),
        (("--variant", "b=int8", "--cluster", "cluster.yaml"), "step 'b' has no model"),
        (("--model", "b=x", "--step", "b=work", "--cluster", "cluster.yaml"), "'b' is to become two Models"),
    ):
        code, _, err = burnish("promote", "p.yaml", *wrong)
        assert code == 2
        assert says in err


def test_what_was_chosen_is_written_for_the_promotion(burnish, tmp_path: Path):
    budget = ("--rate", "20", "--accuracy-drop", "0.025", "--p99-ms", "90", "--out", "chosen.yaml")
    code, _, err = burnish("choose", "plan.yaml", "--measured", "m.yaml", *budget)
    assert code == 0
    assert "burnish pipeline promote plan.yaml --chosen chosen.yaml" in err
    chosen = load_document(tmp_path / "chosen.yaml", ChosenPart)
    assert chosen.variants == {"a": "fp32", "b": "int8"}
    assert chosen.limits == ["accuracy_drop <= 0.025", "latency_p99_ms <= 90"]
    (tmp_path / "other.yaml").write_text(PLAN.replace("name: p\n", "name: q\n").replace("p.inputs", "q.inputs"))
    code, _, err = burnish("promote", "other.yaml", "--chosen", "chosen.yaml", "--cluster", "none.yaml")
    assert (code, "there is no file none.yaml" in err) == (2, True)
    code, _, err = burnish("promote", "other.yaml", "--chosen", "chosen.yaml")
    assert code == 2
    assert "is of the pipeline 'p'" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("analyse", "--picture", "m.yaml/p.svg"),
        ("size", "--rate", "5", "--out", "m.yaml/patches"),
        ("choose", "--out", "m.yaml/chosen.yaml"),
    ],
)
def test_what_cannot_be_written_is_told(burnish, arguments: tuple[str, ...]):
    code, _, err = burnish(arguments[0], "plan.yaml", "--measured", "m.yaml", *arguments[1:])
    assert (code, "could not be written" in err) == (4, True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("analyse", "plan.yaml", "--measured", "none.yaml"), "there is no file none.yaml"),
        (("analyse", "plan.yaml", "--measured", "m.yaml", "--variant", "c=x"), "is not step=variant"),
        (("analyse", "plan.yaml", "--measured", "m.yaml", "--variant", "a=x"), "was not measured"),
        (("analyse", "plan.yaml", "--measured", "m.yaml", "--rate", "60"), "beyond its saturation"),
        (("choose", "plan.yaml", "--measured", "m.yaml", "--objective", "speed"), "--objective 'speed' is not known"),
        (("choose", "plan.yaml", "--measured", "m.yaml", "--cost", "5"), "cost is unknown"),
        (("choose", "plan.yaml", "--measured", "m.yaml", "--rate", "0"), "a rate of 0 requests a second"),
        (("choose", "plan.yaml", "--measured", "m.yaml", "--rate", "-5"), "a rate of -5 requests a second"),
        (("choose", "plan.yaml", "--measured", "m.yaml", "--best", "0"), "--best"),
        (("choose", "plan.yaml", "--measured", "m.yaml", "--memory-mb", "nan"), "a limit of nan on memory_mb"),
        (("choose", "plan.yaml", "--measured", "m.yaml", "--p99-ms", "nan"), "a p99 of nan ms"),
        (("balance", "plan.yaml", "--measured", "m.yaml", "--rate", "5", "--p99-ms", "nan"), "a p99 of nan ms"),
        (("measure", "plan.yaml"), "names no samples"),
    ],
)
def test_what_is_wrong_is_told_in_one_message(burnish, arguments: tuple[str, ...], says: str):
    code, _, err = burnish(*arguments)
    assert code == 2
    assert says in err
