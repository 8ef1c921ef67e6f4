"""``burnish promote``, ``rollback`` and ``history``: who is the champion."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from optimize.cli.endings import Terminated, terminable
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

Work = Annotated[Path | None, typer.Option(help="The working folder, where a campaign file is named.")]


def promote(
    campaign: Annotated[Path, typer.Argument(help="The campaign file, or its working folder.")] = Path("burnish-work"),
    apply: Annotated[
        bool, typer.Option("--apply", help="Do it; without, the plan is shown and nothing changes.")
    ] = False,
    production: Annotated[
        str | None, typer.Option(help="The Model that callers ask; made of the model's name.")
    ] = None,
    weights: Annotated[str, typer.Option(help="Percent of the requests, step by step.")] = "10,50,100",
    mirror: Annotated[int, typer.Option(help="Percent of the requests to copy before; 0 for none.")] = 100,
    watch: Annotated[float, typer.Option(help="Seconds that each step is watched; 0 for not at all.")] = 60.0,
    rate: Annotated[float, typer.Option(help="Requests a second of our own while watching.")] = 25.0,
    samples: Annotated[Path | None, typer.Option(help="The evaluation samples; the campaign file's if named.")] = None,
    prometheus: Annotated[str | None, typer.Option(help="URL of a Prometheus that scrapes Envoy.")] = None,
    matchers: Annotated[str, typer.Option(help='More matchers for it: namespace="seldon".')] = "",
    scrape: Annotated[float, typer.Option(help="How often it asks Envoy, in seconds.")] = 15.0,
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
    from optimize.passports import named_signer
    from optimize.promoting import Options, Promoting, find_subject, open_registry
    from registry.errors import InputError

    if not weights.replace(",", "").replace(" ", "").isdecimal():
        raise InputError(f"the weights are {weights!r}", hint="They are percentages with commas between: 10,50,100.")
    options = Options(
        production=production,
        weights=tuple(int(one) for one in weights.split(",") if one.strip()),
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
    if not apply:
        planned = promoting.plan()
        emit_json(planned.summary()) if json_output else typer.echo("\n".join(planned.lines()))
        if not json_output:
            say("Nothing was changed; --apply does it.")
        return
    back = way_back(subject.work, cluster, campaign if campaign.is_file() else None)
    with told_how_things_stand(subject.work, back):
        planned = promoting.apply(hold=_serve if hold else lambda _: None)
    done = planned.promotion
    if json_output:
        emit_json(planned.summary())
    else:
        typer.echo(f"{done.candidate_name} is the champion of {done.model}: version {done.version}, {done.production}.")
        say(f"Back to what was: {back}")


def way_back(work: Path, cluster: Path | None, campaign: Path | None) -> str:
    """The command that takes back what was promoted from a folder."""
    where = ["--cluster", str(cluster)] if cluster else ["--campaign", str(campaign)] if campaign else []
    return shlex.join(["burnish", "rollback", str(work), *where])


@contextmanager
def told_how_things_stand(work: Path, back: str) -> Iterator[None]:
    """Whoever ends the command by Ctrl-C or SIGTERM is told how things stand, and what goes on or back."""
    from optimize.promoting import after_interruption
    from registry.errors import InterruptedCampaignError

    try:
        with terminable():
            yield
    except (KeyboardInterrupt, Terminated) as ending:
        stands, hint = after_interruption(work, back)
        code = 143 if isinstance(ending, Terminated) else 130
        raise InterruptedCampaignError(f"Interrupted. {stands}", hint=hint, exit_code=code) from None


def _serve(place: object) -> None:
    """Keeps this machine's servers until somebody ends it."""
    import time

    from optimize.production import Place

    if isinstance(place, Place):
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
    from optimize.promoting import roll_back

    with told_how_things_stand(work, way_back(work, cluster, campaign)):
        undone = roll_back(
            work, cluster=cluster, campaign_file=campaign, reason=reason or "rolled back by hand", told=say
        )
    if json_output:
        emit_json({"rolled_back": undone.candidate_name, "model": undone.model, "champion": undone.champion})
    else:
        now = "no version" if undone.champion is None else f"version {undone.champion}"
        typer.echo(f"{undone.candidate_name} is the champion of {undone.model} no more; {now} is again.")


def history(
    model: Annotated[str, typer.Argument(help="The registered model.")],
    work: Annotated[Path, typer.Option(help="A working folder, where its store is the one.")] = Path("burnish-work"),
    json_output: Json = False,
) -> None:
    """Tell who was the champion of a model when, and why.

    Example: burnish history digits
    """
    from optimize.promoting import history as reigns_of
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
