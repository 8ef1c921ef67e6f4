"""A fleet with one model of each fate; made up of the campaign of the doubles."""

import dataclasses
from typing import Any

from registry.records import Comparison, Estimate, Fleet, FleetModel, FleetOutcome, Gain
from registry.report.fleet_gains import gain_of
from tests.doubles import campaigns


def model(name: str, *, group: str = "", share: float = 1.0, minutes: float | None = None) -> FleetModel:
    """A model of the fleet."""
    return FleetModel(name=name, group=group, share=share, minutes=minutes, work=f"models/{name}")


def gain(value: float = 2.72, low: float | None = 2.66, **changed: Any) -> Gain:
    """What the campaign of the doubles won, with another ratio."""
    found = gain_of(campaigns.campaign())
    assert found is not None
    high = None if low is None else 2 * value - low
    ratio = Estimate(value=value, low=low, high=high, runs=3, method="t over paired rounds", unit="1")
    word = "faster" if (low or 0) > 1 else "undecided"
    return dataclasses.replace(found, **{"speed_up": ratio, "word": word, **changed})


def won(name: str, what: Gain | None = None, **changed: Any) -> FleetOutcome:
    """A model with a winner."""
    made = campaigns.campaign()
    return FleetOutcome(
        **{
            "model": name,
            "attempt": 1,
            "state": "won",
            "exit_code": 0,
            "minutes": 12.5,
            "allotted": 30.0,
            "campaign_id": made.id,
            "level": "standard",
            "host": made.host.fingerprint,
            "cpu_model": made.host.cpu_model,
            "sentence": made.verdict.sentence,
            "gain": gain() if what is None else what,
            "ended_at": "2026-01-15T10:30:00+00:00",
            **changed,
        }
    )


def lost(name: str, state: str, **changed: Any) -> FleetOutcome:
    """A model without a winner."""
    return won(
        name, **{"state": state, "exit_code": 3, "campaign_id": "", "level": "", "host": "", **changed}, gain=None
    )


def compared(metric: str, value: float, low: float, high: float) -> Comparison:
    """The selected of the doubles' campaign against its baseline, in one metric."""
    return Comparison(
        candidate_id=campaigns.STATIC_TRITON.id,
        baseline_id=campaigns.BASELINE.id,
        metric=metric,
        load=campaigns.AT_SATURATION if metric.startswith("latency") else None,
        ratio=Estimate(value=value, low=low, high=high, runs=3, method="paired bootstrap", unit="1"),
        noise_floor=0.03,
        word="faster",
    )


def fleet() -> Fleet:
    """Three winners, one without, one failed, one stopped, one that was not begun."""
    outcomes = (
        won("sure", gain(1.9, 1.8)),
        won("wide", gain(3.0, 0.9)),
        won("kept", gain(is_baseline=True, speed_up=None, word=None), provisional=True, level="quick"),
        lost(
            "strict",
            "no_winner",
            campaign_id="c" * 16,
            host="b" * 16,
            cpu_model="Other CPU",
            reason="No candidate meets the policy (2 outside a limit).",
            misses=("accuracy_drop <= 0.001: int8 has 0.0011; accuracy_drop <= 0.0044 would admit it",),
        ),
        lost("broken", "failed", kind="input", exit_code=2, reason="the samples | do not fit <x>"),
        lost("late", "stopped", exit_code=143, reason="the fleet was ended while it was under way"),
    )
    names = [one.model for one in outcomes]
    return Fleet(
        name="spring",
        models=(
            *(model(name, group="vision" if number % 2 else "text") for number, name in enumerate(names)),
            model("next", group="text"),
        ),
        groups={"vision": 2.0},
        parallel=2,
        minutes=480.0,
        outcomes=outcomes,
        spent={one.model: one.minutes for one in outcomes},
    )
