"""Validity gates: what makes a window invalid, each a pure function from what was observed to a finding or None.

An invalid window is measured again, within a bound, and otherwise left out; it is never merely warned about.
"""

from collections.abc import Sequence

from registry.records import GateFinding

LATENESS_MS = 1.0
LATENESS_SHARE = 0.05
OPEN_CPU_SHARE = 0.70
CLOSED_CPU_SHARE = 0.90
SENT_SHARE = 0.99
ERROR_SHARE = 0.001
IN_FLIGHT_SHARE = 0.02
STEAL_SHARE = 0.02
OPEN_CEILING_SHARE = 0.70
CLOSED_CEILING_SHARE = 0.90


def lateness(lateness_p99_ms: float, latency_p50_ms: float) -> GateFinding | None:
    """A finding where requests left so late that the client's delay shows in the server's latency.

    Limit: p99 of (sent - intended) of at most 1 ms, or 5 % of the median latency if that is more.
    """
    limit = max(LATENESS_MS, LATENESS_SHARE * latency_p50_ms)
    if lateness_p99_ms <= limit:
        return None
    return GateFinding(gate="lateness", observed=f"p99 {lateness_p99_ms:.2f} ms", limit=f"{limit:.2f} ms")


def client_cpu(share: float, *, closed: bool) -> GateFinding | None:
    """A finding where the client was busy enough to be what was measured.

    Args:
        share: CPU time of the client over the window, as a share of one core (its event loop cannot use two).
        closed: in a closed loop a busy client only delays the next request, so it may use 90 % of its core before
            the maximum found is its own; in an open loop queueing in the client counts as the server's latency, so
            it may use 70 %.
    """
    limit = CLOSED_CPU_SHARE if closed else OPEN_CPU_SHARE
    if share <= limit:
        return None
    return GateFinding(gate="client_cpu", observed=f"{share:.0%} of its core", limit=f"{limit:.0%}")


def offered(sent: int, scheduled: int) -> GateFinding | None:
    """A finding where fewer requests were sent than had arrived by the schedule (not by the nominal rate)."""
    if sent >= SENT_SHARE * scheduled:
        return None
    return GateFinding(gate="offered", observed=f"{sent} of {scheduled} sent", limit=f"{SENT_SHARE:.0%}")


def errors(failed: int, scheduled: int) -> GateFinding | None:
    """A finding where more than one request in a thousand failed, timed out or was dropped, or none was asked."""
    if scheduled == 0:
        return GateFinding(gate="errors", observed="no request fell into the window", limit="at least 1")
    if failed <= ERROR_SHARE * scheduled:
        return None
    return GateFinding(gate="errors", observed=f"{failed} of {scheduled} failed", limit=f"{ERROR_SHARE:.1%}")


def mismatches(wrong: int, checked: int) -> GateFinding | None:
    """A finding where an answer under load is not the reference's: a broken server may be very fast."""
    if wrong == 0:
        return None
    return GateFinding(gate="mismatch", observed=f"{wrong} of {checked} checked answers are wrong", limit="0")


def answered_by(stranger: str | None) -> GateFinding | None:
    """A finding where another model than the one asked answered, or two versions of it: it was not this one's load."""
    if stranger is None:
        return None
    return GateFinding(gate="answered_by", observed=stranger, limit="one version of the model that was asked")


def in_flight(sampled: Sequence[int], recorded: Sequence[int]) -> GateFinding | None:
    """A finding where what the transport held in flight is not what the recorded times say.

    Little's law, audited without its sampling noise: both are taken at the same instants, one by counting calls in
    the transport, one from the recorded times. They part where times, drops or windows are booked wrongly.
    """
    if not sampled:
        return None
    seen, booked = sum(sampled) / len(sampled), sum(recorded) / len(recorded)
    apart = sum(abs(one - other) for one, other in zip(sampled, recorded, strict=True)) / len(sampled)
    if apart <= IN_FLIGHT_SHARE * max(seen, booked, 1.0):
        return None
    return GateFinding(
        gate="in_flight",
        observed=f"{seen:.2f} in flight, {booked:.2f} by the recorded times",
        limit=f"{IN_FLIGHT_SHARE:.0%} apart",
    )


def steal(share: float) -> GateFinding | None:
    """A finding where the hypervisor took more than 2 % of the machine's CPU time away."""
    if share <= STEAL_SHARE:
        return None
    return GateFinding(gate="steal", observed=f"{share:.1%} of CPU time", limit=f"{STEAL_SHARE:.0%}")


def throttling(periods: int) -> GateFinding | None:
    """A finding where the CPU limit of the control group held its processes up: the limit was measured, not them."""
    if periods == 0:
        return None
    return GateFinding(gate="throttled", observed=f"{periods} periods at the control group's CPU limit", limit="0")


def restarts(instances: tuple[str, str] | None) -> GateFinding | None:
    """A finding where the server was another when the window ended than when it began: restarted, or evicted.

    Args:
        instances: what tells one life of the server from the next, at both ends; None where nobody knows.
    """
    if instances is None or instances[0] == instances[1]:
        return None
    return GateFinding(gate="restarted", observed=f"{instances[0]}, then {instances[1]}", limit="one server throughout")


def ceiling(rate_rps: float, ceiling_rps: float, *, closed: bool) -> GateFinding | None:
    """A finding where the rate is so near to what the client has of a server that does nothing that it measures itself.

    Args:
        rate_rps: offered; in a closed loop, what came back.
        ceiling_rps: of a closed loop against the null server, with requests of the same protocol and size.
        closed: as for `client_cpu`: 90 % of the ceiling in a closed loop, 70 % in an open one.
    """
    limit = CLOSED_CEILING_SHARE if closed else OPEN_CEILING_SHARE
    if rate_rps <= limit * ceiling_rps:
        return None
    observed = f"{rate_rps:.0f}/s of {ceiling_rps:.0f}/s that the client can"
    return GateFinding(gate="ceiling", observed=observed, limit=f"{limit:.0%}")
