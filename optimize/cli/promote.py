"""``burnish promote``, ``rollback`` and ``history``: who is the champion."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optimize.cli.endings import Terminated
from optimize.cli.output import (
    ClusterOption,
    IdentityOption,
    IssuerOption,
    Json,
    PublicKeyOption,
    TrustConfigOption,
    emit_json,
    say,
)
from optimize.cli.promotion import (
    MIRROR,
    RATE_RPS,
    SCRAPE_S,
    WATCH_S,
    WEIGHTS,
    ApplyOption,
    MatchersOption,
    MirrorOption,
    RateOption,
    ScrapeOption,
    WatchOption,
    WeightsOption,
    percentages,
    run_promotion,
    told_how_things_stand,
    way_back,
)

if TYPE_CHECKING:
    from optimize.production import Place

Work = Annotated[Path | None, typer.Option(help="The working folder, where a campaign file is named.")]


def promote(
    campaign: Annotated[Path, typer.Argument(help="The campaign file, or its working folder.")] = Path("burnish-work"),
    apply: ApplyOption = False,
    production: Annotated[
        str | None, typer.Option(help="The Model that callers ask; made of the model's name.")
    ] = None,
    weights: WeightsOption = WEIGHTS,
    mirror: MirrorOption = MIRROR,
    watch: WatchOption = WATCH_S,
    rate: RateOption = RATE_RPS,
    samples: Annotated[Path | None, typer.Option(help="The evaluation samples; the campaign file's if named.")] = None,
    prometheus: Annotated[str | None, typer.Option(help="URL of a Prometheus that scrapes Envoy.")] = None,
    matchers: MatchersOption = "",
    scrape: ScrapeOption = SCRAPE_S,
    passport: Annotated[Path | None, typer.Option(help="The variant's passport; that in the working folder.")] = None,
    public_key: PublicKeyOption = None,
    identity: IdentityOption = None,
    issuer: IssuerOption = None,
    trust_config: TrustConfigOption = None,
    cluster: ClusterOption = None,
    work: Work = None,
    port: Annotated[int | None, typer.Option(help="Of this machine's Envoy; a free one if not given.")] = None,
    hold: Annotated[bool, typer.Option("--hold", help="This machine: serve until Ctrl-C afterwards.")] = False,
    json_output: Json = False,
) -> None:
    """Make what a campaign chose the champion: by a mirror and growing weights, each watched, then in its place.

    The plan is shown; --apply carries it out. Failure, Ctrl-C and kill leave the old champion in its place, and the
    same command again goes on where it stopped.

    Example: burnish promote campaign.yaml --watch 120 --apply
    """
    from optimize.model_promoting import Promoting, find_subject
    from optimize.passports import named_signer
    from optimize.promoting import Options
    from optimize.rollback import open_registry

    options = Options(
        production=production,
        weights=percentages(weights),
        mirror=mirror,
        watch_s=watch,
        rate_rps=rate,
        samples=samples,
        prometheus=prometheus,
        matchers=matchers,
        scrape_s=scrape,
        passport=passport,
        signer=named_signer(public_key, identity, issuer, trust_config),
        port=port,
    )
    subject = find_subject(campaign, work=work, cluster=cluster, options=options)
    promoting = Promoting(subject, options, open_registry(subject.work), say)
    run_promotion(
        promoting,
        apply=apply,
        work=subject.work,
        back=way_back(subject.work, cluster, campaign if campaign.is_file() else None),
        json_output=json_output,
        hold=_serve if hold else lambda _: None,
    )


def _serve(place: "Place") -> None:
    """Keeps this machine's servers until somebody ends it."""
    import time

    target = place.target_of(place.rollout.production)
    say(f"{place.rollout.production} is served at {target.url} over {target.protocol} (Ctrl-C ends it)")
    try:
        while True:
            time.sleep(1)
    except (KeyboardInterrupt, Terminated):
        return


def rollback(
    work: Annotated[Path, typer.Argument(help="The campaign's working folder.")] = Path("burnish-work"),
    cluster: ClusterOption = None,
    campaign: Annotated[Path | None, typer.Option(help="The campaign file, which names the cluster.")] = None,
    reason: Annotated[str, typer.Option(help="Why, for the history.")] = "",
    json_output: Json = False,
) -> None:
    """Take the last promotion back: manifests, what is in force, and the alias, all as before its first step.

    Example: burnish rollback burnish-work --reason "the p99 rose at noon"
    """
    from optimize.rollback import roll_back

    with told_how_things_stand(work, way_back(work, cluster, campaign)):
        undone = roll_back(
            work, cluster=cluster, campaign_file=campaign, reason=reason or "rolled back by hand", told=say
        )
    if json_output:
        emit_json({"rolled_back": undone.candidate_name, "model": undone.model, "champion": undone.champion})
    else:
        now = "no version" if undone.champion is None else f"version {undone.champion}"
        typer.echo(f"The promotion of {undone.candidate_name} is undone; {now} is the champion of {undone.model}.")


def history(
    model: Annotated[str, typer.Argument(help="The registered model.")],
    work: Annotated[Path, typer.Option(help="A working folder, where its store is the one.")] = Path("burnish-work"),
    json_output: Json = False,
) -> None:
    """Tell who was the champion of a model when, and why.

    Example: burnish history digits
    """
    from optimize.rollback import history as reigns_of
    from registry.codec import to_jsonable
    from registry.report.table import printable

    reigns, word = reigns_of(model, work)
    if json_output:
        emit_json({"model": model, "champions": [to_jsonable(one) for one in reigns], "note": word or None})
        return
    for one in reigns:
        who = "no version" if one.version is None else f"version {one.version}"
        named = f" {one.candidate}" if one.candidate else ""
        typer.echo(printable(f"{one.since[:19]}  {who}{named}, {one.how} at {one.location}: {one.reason}"))
    if word or not reigns:
        typer.echo(printable(word) or f"{model} never had a champion.")
