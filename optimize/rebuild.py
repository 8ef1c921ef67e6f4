"""A variant made again from its passport, and proved equal: in bytes, or else in what it answers."""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from optimize.config import CampaignConfig, SourceConfig, load_campaign
from optimize.fidelity import load_outputs, measure_fidelity
from optimize.judging import limits_of
from optimize.making import make_source, make_variant
from optimize.metrics import Outputs
from optimize.passports import resolved_signer
from optimize.plan import Observer, Workspace, plan
from optimize.recipes import needs_calibration
from optimize.samples import SampleFile, load_samples, open_samples
from profiles.measure.host import widest_instruction_set
from registry import codec, passport
from registry.errors import CheckFailedError, InputError
from registry.keyless import SignerIdentity
from registry.ledger import Ledger
from registry.records import Failure, Source, Variant
from registry.store import FolderStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """What came of making a variant again.

    Attributes:
        variant: as it was made now.
        equal: whether its files have the same bytes, or its answers to the evaluation samples are the same numbers;
            None where neither is so, or answers could not be compared.
        findings: what differs, a sentence each: where ``equal`` is None, why that is so.
    """

    variant: Variant
    equal: Literal["bytes", "outputs"] | None
    findings: tuple[str, ...]


def rebuild(
    path: Path,
    *,
    signer: Path | SignerIdentity | None,
    campaign_file: Path,
    original: Path | None,
    out: Path | None,
    observer: Observer,
) -> Rebuilt:
    """Makes the variant of a passport again, in a working folder of its own, and compares.

    Args:
        path: the passport.
        signer: PEM file of the public key, or the identity, that it must be signed by.
        campaign_file: names the source, the calibration samples, and the evaluation samples that answers are compared
            on; the recipe and the seed are the passport's.
        original: the folder of the variant's files, for answers to be compared where bytes differ; or None.
        out: a new folder for what was made, or None.
        observer: told what is done.

    Raises:
        CheckFailedError: the passport is not genuine, the files are not those it names, or source or calibration
            samples are others, or the recipe no longer applies.
        InputError: passport, key, campaign file or a folder is missing or does not fit.
    """
    if out is not None and out.exists():
        raise InputError(f"{out} exists", hint="Name a new folder.")
    checked = passport.check(path, resolved_signer(signer), artifact=original)
    if checked.findings:
        raise CheckFailedError(f"{path}: {'; '.join(checked.findings)}")
    wanted = codec.from_jsonable(Variant, checked.statement["predicate"]["variant"])
    config = load_campaign(campaign_file)
    config = config.model_copy(update={"seed": wanted.seed, "predict": False})
    with tempfile.TemporaryDirectory(prefix="burnish-rebuild-") as scratch:
        work = Path(scratch)
        planned = plan(config, base=campaign_file.parent, work=work)
        with Ledger.open(work / "ledger.jsonl") as ledger:
            workspace = Workspace(plan=planned, store=FolderStore(work), ledger=ledger, observer=observer)
            made = _made(workspace, wanted, checked.statement["predicate"])
            rebuilt = _compared(workspace, wanted, made, original)
            if out is not None:
                shutil.copytree(workspace.store.path(made.artifact), out)
    return rebuilt


def _made(workspace: Workspace, wanted: Variant, said: Mapping[str, Any]) -> Variant:
    planned = workspace.plan
    source, _ = make_source(workspace, _source_config(planned.config, wanted.source))
    recorded = codec.from_jsonable(Source, said["source"])
    if source.digest != wanted.source_digest:
        raise CheckFailedError(
            f"the source {source.name} has the digest {source.digest[:16]}…, that of the passport "
            f"{recorded.digest[:16]}…: it is another model, or was exported by other tools"
        )
    made = make_variant(workspace, source, wanted.recipe, wanted.name, _calibration(workspace, wanted))
    if isinstance(made, Failure):
        raise CheckFailedError(f"{wanted.name} cannot be made here: {made.reason}")
    return made


def _source_config(config: CampaignConfig, name: str) -> SourceConfig:
    for source in config.sources:
        if source.name == name:
            return source
    listed = ", ".join(source.name for source in config.sources)
    raise InputError(f"the campaign file has no source {name!r}", hint=f"It has: {listed}.")


def _calibration(workspace: Workspace, wanted: Variant) -> SampleFile | None:
    given = workspace.plan.config.samples.calibration
    samples = None if given is None else open_samples(workspace.plan.path(given)).checked()
    if not needs_calibration(wanted.recipe):
        return samples
    digest = None if samples is None else samples.digest
    if digest != wanted.calibration_digest:
        raise CheckFailedError(
            f"{wanted.name} was calibrated on samples of the digest {wanted.calibration_digest}, "
            f"and those of the campaign file have {digest}"
        )
    return samples


def _compared(workspace: Workspace, wanted: Variant, made: Variant, original: Path | None) -> Rebuilt:
    if made.artifact.digest == wanted.artifact.digest:
        return Rebuilt(variant=made, equal="bytes", findings=())
    findings = _versions(wanted.tool_versions, made.tool_versions)
    before = {file.path: file.sha256 for file in wanted.artifact.files}
    now = {file.path: file.sha256 for file in made.artifact.files}
    differ = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    findings.append(f"not the same bytes: {', '.join(differ)}")
    if original is None:
        findings.append("its answers could not be compared: the original's files were not named")
        return Rebuilt(variant=made, equal=None, findings=tuple(findings))
    # Both are run here, in the recipe's engine.
    ours = _answers(workspace, made, workspace.store.path(made.artifact))
    unlike = unlike_answers(ours, _answers(workspace, wanted, original))
    return Rebuilt(variant=made, equal=None if unlike else "outputs", findings=(*findings, *unlike))


def _versions(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [
        f"{name} was {before.get(name, 'absent')}, is now {now.get(name, 'absent')}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def unlike_answers(ours: Outputs, theirs: Outputs) -> list[str]:
    """Where two models' answers to the same samples are not the same numbers, a sentence for each output.

    Args:
        ours: output name -> array (samples, ...) of what was made again.
        theirs: the same of the original.
    """
    if ours.keys() != theirs.keys():
        return [f"its outputs are {sorted(ours)}, the original's {sorted(theirs)}"]
    found = []
    for name, array in theirs.items():
        if ours[name].shape != array.shape:
            found.append(f"its output {name} has the shape {ours[name].shape}, the original's {array.shape}")
        elif not np.array_equal(ours[name], array):
            unlike = int(np.sum(np.any((ours[name] != array).reshape(len(array), -1), axis=1)))
            found.append(f"its output {name} differs from the original's for {unlike} of {len(array)} samples")
    return found


def _answers(workspace: Workspace, variant: Variant, folder: Path) -> Outputs:
    planned = workspace.plan
    samples = planned.path(planned.config.samples.evaluation)
    out = workspace.folder("outputs") / f"{variant.artifact.digest}.npz"
    measure_fidelity(
        variant.id,
        folder / variant.artifact.entry,
        variant.recipe.engines[0],
        samples=samples,
        samples_digest=load_samples(samples).digest,
        out=out,
        reference=None,
        metric=planned.config.metric,
        batch_size=1,
        instruction_set=widest_instruction_set(planned.host),
        threads=1,
        seed=planned.config.seed,
        adaptation=variant.adaptation,
        limits=limits_of(workspace),
        python_path=planned.base,
    )
    return load_outputs(out)
