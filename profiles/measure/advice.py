"""What to do with a capacity that was found: how to load a replica, how many replicas a rate takes, and why no more."""

from dataclasses import dataclass

from profiles.measure.capacity import estimate_saturation
from profiles.measure.usl import UslFit, explain_fit, find_knee, fit_usl
from profiles.serving.core2.sizing import MARGIN, MARGINS, rate_per_replica, replicas_for
from registry.records import Capacity, CapacityAdvice


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What follows from a capacity.

    Attributes:
        knee: the smallest concurrency whose throughput is within 5 % of the highest; None where nothing was answered.
        law: the Universal Scalability Law of the ladder, or why there is none.
        target_rps: (least, most) requests a second to give one replica, 20 and 10 % below its saturation point; None
            where it has none.
        replicas: how many the wanted rate takes, each kept 15 % below saturation; None where no rate was given, or
            there is no saturation point.
        lines: all of it for people, a sentence each.
    """

    knee: int | None
    law: UslFit | str
    target_rps: tuple[float, float] | None
    replicas: int | None
    lines: tuple[str, ...]


def advise(capacity: Capacity, *, for_rate_rps: float | None = None) -> Advice:
    """What follows from a capacity, for one replica and for a rate.

    The margin below saturation is Seldon's advice in its guide to performance tuning of Core 2: it gives an autoscaler
    the time that a replica takes to start.

    Args:
        capacity: that was found.
        for_rate_rps: requests a second that all replicas are to take together, or None.

    Raises:
        InputError: that rate is not above 0.
    """
    knee, law = find_knee(capacity.ladder), fit_usl(capacity.ladder)
    saturation = estimate_saturation(capacity)
    target = replicas = None
    lines = []
    if knee is not None:
        lines += [f"More than {knee} requests at a time only wait longer.", _explained(law)]
    if saturation is not None:
        # The lower end: what was sustained.
        known_rps = saturation.value if saturation.low is None else saturation.low
        target = (rate_per_replica(known_rps, MARGINS[1]), rate_per_replica(known_rps, MARGINS[0]))
        lines.append(
            f"Give one replica {target[0]:.4g} to {target[1]:.4g} requests a second, 10 to 20 % below saturation."
        )
        if for_rate_rps is not None:
            replicas = replicas_for(for_rate_rps, known_rps)
            count = "1 replica" if replicas == 1 else f"{replicas} replicas"
            lines.append(f"{for_rate_rps:g} requests a second take {count}, each kept {MARGIN:.0%} below saturation.")
    elif for_rate_rps is not None:
        lines.append("No saturation point was found, so that no number of replicas follows.")
    return Advice(knee=knee, law=law, target_rps=target, replicas=replicas, lines=tuple(lines))


def advice_of(capacity: Capacity) -> CapacityAdvice:
    """The same as a campaign records it, for one replica of one candidate."""
    found = advise(capacity)
    law = {} if isinstance(found.law, str) else {name: getattr(found.law, name) for name in ("gamma", "sigma", "kappa")}
    return CapacityAdvice(
        candidate_id=capacity.candidate_id,
        knee=found.knee,
        law=law,
        explanation="" if found.knee is None else _explained(found.law),
        target_rps=found.target_rps,
        lines=found.lines,
    )


def _explained(law: UslFit | str) -> str:
    if isinstance(law, str):
        return f"{law[0].upper()}{law[1:]}."
    told = explain_fit(law)
    return f"{told[0].upper()}{told[1:]} (Universal Scalability Law, at most {law.worst:.1%} off)."
