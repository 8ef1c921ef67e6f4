"""A campaign with everything that a report can show: spectra, capacity's law, a search, a champion; made up."""

import dataclasses
import math

from registry.records import Campaign, CapacityAdvice, Champion, Comparison, ServingPoint, ServingProfile, ServingSearch
from registry.records import Spectrum as Percentiles
from tests.doubles import campaigns
from tests.doubles.campaigns import estimate

PERCENTILES = (10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0)
LAW = {
    "gamma": estimate(620.0, 12.0, "1/s", runs=6),
    "sigma": estimate(0.41, 0.03, "1", runs=6),
    "kappa": estimate(0.0, 0.0, "1", runs=6),
}


def spectra() -> tuple[Percentiles, ...]:
    """Exponential tails of each candidate at 0.8 of saturation."""
    return tuple(
        Percentiles(
            candidate_id=one.id,
            load=campaigns.AT_SATURATION,
            requests=1500,
            points=tuple(
                (p, round(campaigns.LAWS[one.id][3] * (1 - 1.4 * math.log(1 - p / 100)), 3)) for p in PERCENTILES
            ),
        )
        for one in campaigns.CANDIDATES
    )


def advice() -> tuple[CapacityAdvice, ...]:
    """A law for one candidate, none for the others."""
    return tuple(
        CapacityAdvice(
            candidate_id=one.id,
            knee=8,
            law=LAW if one is campaigns.STATIC_TRITON else {},
            explanation="41% of the work cannot be done side by side (Universal Scalability Law, at most 1.0% off)."
            if one is campaigns.STATIC_TRITON
            else "No law is fitted: 4 concurrencies were tried, it takes 6.",
            target_rps=(0.8 * campaigns.LAWS[one.id][0], 0.9 * campaigns.LAWS[one.id][0]),
            lines=("More than 8 requests at a time only wait longer.",),
        )
        for one in campaigns.CANDIDATES
    )


def search() -> ServingSearch:
    """Twelve profiles, on two servers and both protocols."""
    points = []
    for server, backend in (("mlserver", "burnish"), ("triton", "python")):
        for protocol in ("grpc", "rest"):
            for batch in (1, 4, 16):
                profile = ServingProfile(
                    server=server,  # type: ignore[arg-type]
                    backend=backend,  # type: ignore[arg-type]
                    protocol=protocol,  # type: ignore[arg-type]
                    max_batch_size=batch,
                    max_batch_delay_ms=0.0 if batch == 1 else 2.0,
                    instances=2 if server == "triton" and batch == 16 else 1,
                )
                rate = (
                    (300 if server == "triton" else 200)
                    * (1 + math.log2(batch) / 3)
                    * (1 if protocol == "grpc" else 0.6)
                )
                points.append(
                    ServingPoint(profile=profile, score=estimate(rate, 9.0, "1/s", runs=1), reason="expected")
                )
    best = max(points, key=lambda one: one.score.value if one.score else 0.0)
    return ServingSearch(
        space=240,
        points=tuple(points),
        best=best,
        maxima={},
        bounded_out=30,
        stopped="nothing_pays",
        sentence=f"{best.profile.key} is best: looked at 12 of 240 serving profiles (5 %), since no other can pay",
        variant_name="int8-static",
    )


def champion() -> Champion:
    """The static variant on MLServer serves now; two others were compared with it."""
    return Champion(
        named="models:/digits@champion",
        candidate_id=campaigns.STATIC_MLSERVER.id,
        was="int8-static @ mlserver-grpc-b8-d2",
        campaign_id="0123456789abcdef",
        comparisons=tuple(
            Comparison(
                candidate_id=one.id,
                baseline_id=campaigns.STATIC_MLSERVER.id,
                metric="max_throughput_rps",
                load=None,
                ratio=estimate(ratio, 0.05, "1"),
                noise_floor=0.03,
                word=word,  # type: ignore[arg-type]
            )
            for one, ratio, word in (
                (campaigns.BASELINE, 0.51, "slower"),
                (campaigns.STATIC_TRITON, 1.40, "faster"),
            )
        ),
        notes=("It was chosen with onnxruntime 1.30.0, and is measured with 1.31.1.",),
    )


def rich(*, level: str = "quick") -> Campaign:
    """The campaign of the doubles, with all of it."""
    made = campaigns.campaign(level=level)
    return dataclasses.replace(
        made,
        spectra=spectra(),
        advice=advice(),
        serving_searches=(search(),),
        champion=champion(),
        verdict=dataclasses.replace(made.verdict, champion=campaigns.STATIC_MLSERVER.id),
    )
