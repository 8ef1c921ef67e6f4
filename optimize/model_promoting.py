"""The promotion of what a campaign chose: it is found and checked, registered, and watched in production."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize import passports, reporting
from optimize.cluster_config import ClusterConfig, LocalConfig, load_cluster
from optimize.live_fidelity import JUDGED, LiveFidelity, variant_of
from optimize.production import Place, Served, open_place, production_name
from optimize.promoting import BasePromoting, Options, Task
from optimize.rollback import Told
from registry import promotion as promotions
from registry.errors import CheckFailedError, InputError
from registry.filesystems import local_path
from registry.keyless import SignerIdentity
from registry.ports import Probe, RegisteredVersion
from registry.promotion import CHAMPION, UNREGISTERED, Journal
from registry.records import Campaign, Candidate, Promotion, Variant
from registry.store import FolderStore

if TYPE_CHECKING:
    from optimize.samples import Samples
    from profiles.measure.prometheus import Prometheus
    from registry.mlflow_registry import MlflowRegistry


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is to be promoted, and where.

    Attributes:
        campaign: that chose it.
        candidate: it.
        variant: what it serves.
        files: folder with the variant's files.
        work: the working folder.
        cluster: where it is in production.
        base: the folder that the cluster's paths are relative to.
        samples: the evaluation samples, where they are known.
        notes: what is to be known, a sentence each.
    """

    campaign: Campaign
    candidate: Candidate
    variant: Variant
    files: Path
    work: Path
    cluster: ClusterConfig
    base: Path
    samples: Path | None
    notes: tuple[str, ...]


def find_subject(where: Path, *, work: Path | None, cluster: Path | None, options: Options) -> Subject:
    """What a campaign chose, checked: its verdict, its files, and its passport.

    Args:
        where: a campaign file, or a working folder.
        work: the working folder, where a campaign file is named and it is not beside it.
        cluster: a file with a section ``cluster:``, in place of the campaign file's.
        options: name samples and passport.

    Raises:
        NoVariantError: the campaign selected nothing.
        InputError: its verdict is provisional, there is no finished campaign, or a file is missing or was changed.
        CheckFailedError: the passport is not genuine, or says something else.
    """
    samples, base, configured = options.samples, where, load_cluster(cluster)
    if where.is_file():
        from optimize.config import load_campaign

        config = load_campaign(where)
        base = where.resolve().parent
        work = work or where.parent / "burnish-work"
        configured = configured if cluster is not None else config.cluster
        samples = samples or local_path(config.samples.evaluation, base)
    elif work is not None and work != where:
        raise InputError(f"{where} is no campaign file, and goes with no --work", hint="Name one of them.")
    work = work or where
    if cluster is not None:
        base = cluster.resolve().parent
    campaign = reporting.read_campaign(work)
    candidate = promotions.chosen(campaign)
    variant = variant_of(campaign, candidate)
    files = FolderStore(work).path(variant.artifact)
    notes = _check_passport(campaign, variant, files, work, options)
    return Subject(
        campaign=campaign,
        candidate=candidate,
        variant=variant,
        files=files,
        work=work,
        cluster=configured,
        base=base,
        samples=samples,
        notes=notes,
    )


def _check_passport(campaign: Campaign, variant: Variant, files: Path, work: Path, options: Options) -> tuple[str, ...]:
    from registry import passport

    if options.signer is None and options.passport is None:
        return ("No passport was checked: none was asked for with --public-key or --identity.",)
    signer = passports.resolved_signer(options.signer)
    usual = passports.passport_path(work, variant, keyless=isinstance(signer, SignerIdentity))
    path = options.passport or usual
    checked = passport.check(path, signer, artifact=files, campaign=campaign)
    told = checked.statement["predicate"].get("variant")
    findings = list(checked.findings)
    if not isinstance(told, dict) or told.get("id") != variant.id:
        findings.append(f"it is not the passport of {variant.name}")
    if findings:
        raise CheckFailedError(f"{path}: {'; '.join(findings)}", hint="Nothing was promoted.")
    return (f"The passport {path} is genuine, and says what files and record do.",)


class Promoting(BasePromoting):
    """The promotion of what a campaign chose."""

    def __init__(self, subject: Subject, options: Options, registry: "MlflowRegistry", told: Told) -> None:
        """Asks nobody yet.

        Args:
            subject: what is promoted.
            options: how.
            registry: where its version is.
            told: hears what is done.
        """
        task = Task(
            campaign_id=subject.campaign.id,
            candidate_id=subject.candidate.id,
            production=options.production or production_name(subject.campaign.model_name),
            work=subject.work,
            cluster=subject.cluster,
            base=subject.base,
            samples=subject.samples,
        )
        super().__init__(task, options, registry, told)
        self._subject = subject

    @contextmanager
    def _place(self, *, serve: bool) -> Iterator[Place]:
        subject = self._subject
        served = Served(candidate=subject.candidate, artifact=subject.variant.artifact, files=subject.files)
        with open_place(
            subject.cluster,
            base=subject.base,
            work=subject.work,
            production=self._production,
            served=served,
            serve=serve,
            port=self._options.port,
        ) as place:
            yield place

    def _registered(self) -> RegisteredVersion | None:
        campaign = self._subject.campaign
        return self._registry.find(
            campaign.model_name, campaign_id=campaign.id, candidate_id=self._subject.candidate.id
        )

    def _register(self) -> RegisteredVersion:
        """Sends the campaign to MLflow, where the selected candidate becomes a version."""
        self._told("the campaign is recorded in MLflow")
        reporting.publish(self._subject.campaign, self._subject.work)
        registered = self._registered()
        if registered is None:
            raise InputError(
                f"MLflow has no version of {self._subject.campaign.model_name} for {self._subject.candidate.name}",
                hint="Its files have to be on this machine when the campaign is recorded.",
            )
        return registered

    def _new(self, journal: Journal | None, place: Place, registered: RegisteredVersion | None) -> Promotion:
        subject, campaign, policy = self._subject, self._subject.campaign, self._subject.campaign.verdict.policy
        champion = self._version(self._registry.aliases(campaign.model_name).get(CHAMPION))
        at_once = promotions.at_once(policy, registered or self._described(), champion)
        serving = place.rollout.serving()
        if serving and champion is None:
            raise InputError(
                f"{self._production} serves something at {place.rollout.location}, and no version of "
                f"{campaign.model_name} is the champion, so that nobody knows whether the two take the same requests",
                hint=f"Give the alias {CHAMPION} to the version that it serves, or name another Model with "
                "--production.",
            )
        if serving and champion is not None and registered is not None and registered.version == champion.version:
            raise InputError(
                f"{subject.candidate.name} is the champion of {campaign.model_name} already: version "
                f"{champion.version}",
                hint="There is nothing to promote.",
            )
        beside, judged = serving != "" and not at_once, subject.samples is not None
        told = _notes(beside=beside, at_once=at_once, judged=judged, options=self._options)
        return self._drafted(
            journal,
            place,
            registered,
            model=campaign.model_name,
            candidate_name=subject.candidate.name,
            policy=policy,
            beside=beside,
            reason=campaign.verdict.sentence,
            notes=(*subject.notes, *self._place_notes(), *told),
            resource="model",
        )

    def _place_notes(self) -> tuple[str, ...]:
        if not isinstance(self._subject.cluster, LocalConfig):
            return ()
        return ("On this machine servers run while the command does: a rehearsal. --hold goes on serving.",)

    def _version(self, version: str | None) -> RegisteredVersion | None:
        model = self._subject.campaign.model_name
        return None if version is None else self._registry.version(model, version)

    def _described(self) -> RegisteredVersion:
        """What the registry will say of the challenger."""
        artifact = self._subject.variant.artifact
        return RegisteredVersion(
            model=self._subject.campaign.model_name,
            version=UNREGISTERED,
            fingerprint="",
            candidate_id=self._subject.candidate.id,
            candidate=self._subject.candidate.name,
            signature=promotions.described(artifact.inputs, artifact.outputs),
        )

    def _own_probe(self, place: Place, stack: ExitStack) -> Probe:
        from profiles.measure.live import RequestProbe, made_up

        subject, loaded = self._subject, self._samples
        fidelity = None
        if loaded is not None and subject.samples is not None:
            fidelity = stack.enter_context(closing(self._fidelity(subject.samples, loaded)))
        return RequestProbe(
            production=place.rollout.production,
            challenger=place.rollout.challenger,
            target_of=place.target_of,
            inputs=made_up(subject.variant.artifact.inputs) if loaded is None else self._inputs(loaded),
            rate_rps=self._options.rate_rps,
            fidelity=fidelity,
            judged=frozenset() if fidelity is None else self._judged(),
        )

    def _by_prometheus(self, own: Probe, place: Place, prometheus: "Prometheus") -> Probe:
        from profiles.deploy.envoy_config import FLUSH_S as FLUSH_HERE_S
        from profiles.measure.prometheus import FLUSH_S, PrometheusProbe

        options = self._options
        flush_s = FLUSH_HERE_S if isinstance(self._subject.cluster, LocalConfig) else FLUSH_S
        return PrometheusProbe(
            prometheus=prometheus,
            production=place.rollout.production,
            challenger=place.rollout.challenger,
            meanwhile=own,
            # What happened last is in the histogram after a flush, and scraped at the second scrape from then on.
            settle=lambda: time.sleep(flush_s + 2 * options.scrape_s),
            matchers=options.matchers,
        )

    def _fidelity(self, samples: Path, loaded: "Samples") -> LiveFidelity:
        subject = self._subject
        return LiveFidelity(
            subject.campaign,
            subject.candidate,
            samples=samples,
            loaded=loaded,
            store=FolderStore(subject.work),
            base=subject.base,
        )

    def _inputs(self, loaded: "Samples") -> Mapping[str, Any]:
        from optimize.adaptation import adapt

        return adapt(loaded.inputs, self._subject.variant.adaptation)

    def _judged(self) -> frozenset[str]:
        """What live answers will tell: of all that can be judged, what the campaign knew of the candidate."""
        fidelities = [one for one in self._subject.campaign.fidelities if one.variant_id == self._subject.variant.id]
        return frozenset(name for one in fidelities for name in one.metrics) & JUDGED


def _notes(*, beside: bool, at_once: bool, judged: bool, options: Options) -> tuple[str, ...]:
    told = []
    if at_once:
        told.append(
            "It takes or gives other tensors than the champion, so that it takes its place at once, never by weights: "
            "callers have to change with it."
        )
    elif not beside:
        told.append("Nothing is in production yet, so that there is nobody to share requests with.")
    if not options.watch_s:
        return (*told, "Nothing is watched: --watch 0.")
    if beside:
        told.append(
            "Envoy sends a request that fails with a 5xx again, up to 5 times: callers see slowness, not failure, so "
            "that latency tells of failures, too."
        )
        told.append(
            "Replies to mirrored requests are dropped, and those to callers are not seen: what the challenger answers "
            "is judged by requests of our own alone."
        )
    shared = ", half of them to the challenger itself" if beside else ""
    source = (
        "Envoy's histogram, as Prometheus has it: of all traffic, no finer than its buckets"
        if options.prometheus
        else f"requests of our own alone ({options.rate_rps:g} a second{shared})"
    )
    told.append(f"Latency is that of {source}.")
    if not judged:
        told.append("Live answers are judged where the evaluation samples are known (a campaign file, or --samples).")
    return tuple(told)
