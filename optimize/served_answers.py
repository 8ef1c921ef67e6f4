"""How a server's own engine answers: of another version than ours, so that what was judged in process is not its."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from optimize.fidelity import fidelity_components, judge_answers, save_outputs
from optimize.judging import limits_of
from optimize.plan import Workspace
from optimize.sources import code_digests
from profiles.deploy.core2_candidates import UNKNOWN_VERSION
from profiles.measure.answers import answers_of
from registry.codec import digest
from registry.records import Candidate, Fidelity, Target


def judge_served(
    workspace: Workspace,
    candidate: Candidate,
    target: Target,
    inputs: Mapping[str, NDArray[Any]],
    *,
    samples_digest: str,
    reference: Path,
    parity: bool,
    adapted: bool,
) -> Fidelity:
    """How a candidate answers the evaluation samples where it is served.

    Args:
        workspace: the plan, and where the answers go.
        candidate: whose engine and version the fidelity is of.
        target: where it is served.
        inputs: the samples as it takes them.
        samples_digest: what identifies the samples.
        reference: the baseline's answers in process.
        parity: whether they are of the same source.
        adapted: whether ``inputs`` are others than the samples.

    Raises:
        UnreachableError: the server does not answer.
        BurnishError: its answers cannot be judged.
    """
    plan = workspace.plan
    path = workspace.folder("outputs") / f"served-{candidate.id}-{digest([samples_digest])}.npz"
    save_outputs(path, answers_of(target, inputs, limit_s=limits_of(workspace).timeout_s))
    return judge_answers(
        candidate.variant_id,
        candidate.engine,
        engine_version=candidate.engine_version,
        instruction_set=UNKNOWN_VERSION,
        batch_size=candidate.serving.max_batch_size,
        answers=path,
        samples=plan.path(plan.config.samples.evaluation),
        samples_digest=samples_digest,
        reference=reference,
        parity=parity,
        metric=plan.config.metric,
        adapted=adapted,
        limits=limits_of(workspace),
        python_path=plan.base,
    )


def components_of(
    workspace: Workspace, candidate: Candidate, *, samples_digest: str, reference: Path, parity: bool
) -> dict[str, Any]:
    """What the result of `judge_served` depends on."""
    plan = workspace.plan
    known = fidelity_components(
        candidate.variant_id,
        candidate.engine,
        engine_version=candidate.engine_version,
        instruction_set=UNKNOWN_VERSION,
        batch_size=candidate.serving.max_batch_size,
        samples_digest=samples_digest,
        metric=plan.config.metric,
        metric_code=code_digests(plan.config.metric, plan.base) if ":" in plan.config.metric else None,
        parity=parity,
    )
    return {**known, "candidate": candidate.id, "reference": reference.stem}
