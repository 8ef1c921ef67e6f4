"""Candidates to render and deploy in tests."""

from typing import Any

from registry.codec import digest, to_jsonable
from registry.records import Candidate, EngineSpec, ServingProfile


def candidate(
    *, variant: str = "mlp/float32", engine: EngineSpec | None = None, server: str = "mlserver", **serving: Any
) -> Candidate:
    """A candidate of this variant, engine and serving profile; its id depends on all of them."""
    backend = {"mlserver": "burnish", "triton": "python"}[server]
    profile = ServingProfile(**{"server": server, "backend": backend, **serving})
    spec = engine or EngineSpec(name="onnxruntime")
    return Candidate(
        id=digest([variant, to_jsonable(spec), to_jsonable(profile)]),
        name=f"{variant} @ {profile.key}",
        variant_id="0123456789abcdef",
        variant_name=variant,
        engine=spec,
        engine_version="1.0",
        serving=profile,
        server_version="1.0",
    )
