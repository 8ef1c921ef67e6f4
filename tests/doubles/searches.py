"""A search for a serving profile, as a campaign keeps it: three looks, the second of which failed."""

from registry.records import Estimate, ServingPoint, ServingProfile, ServingSearch


def profile(batch: int, delay_ms: float = 0.0) -> ServingProfile:
    """A profile of MLServer."""
    return ServingProfile(server="mlserver", backend="burnish", max_batch_size=batch, max_batch_delay_ms=delay_ms)


def rate(value: float) -> Estimate:
    """What one window says of the rate."""
    return Estimate(value=value, low=None, high=None, runs=1, method="single run", unit="1/s")


def search() -> ServingSearch:
    """What the search of ``int8-static`` came to."""
    points = (
        ServingPoint(profile=profile(1), score=rate(450.0), reason="where the campaign starts"),
        ServingPoint(profile=profile(64), score=None, reason="far from the others", failure="the server died"),
        ServingPoint(profile=profile(16, 5.0), score=rate(610.0), reason="expected to be the best"),
        ServingPoint(profile=profile(8, 5.0), score=rate(580.0), reason="beside the best"),
    )
    return ServingSearch(
        space=96,
        points=points,
        best=points[2],
        maxima={"1": points[2]},
        bounded_out=12,
        stopped="nothing_pays",
        sentence="4 of 96 profiles were looked at, and no other is expected to pay",
        variant_name="int8-static",
    )
