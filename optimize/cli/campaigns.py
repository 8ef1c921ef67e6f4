"""``burnish demo``, ``init``, ``make`` and ``run``: campaigns, and parts of them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optimize.cli.endings import terminable
from optimize.cli.output import Json, emit_json, progress, say

if TYPE_CHECKING:
    from optimize.config import CampaignConfig

Work = Annotated[
    Path | None, typer.Option(help="The working folder; burnish-work beside the campaign file if not given.")
]
LevelOption = Annotated[str | None, typer.Option(help="Level of proof, not the file's: quick, standard or proof.")]
EngineOption = Annotated[
    str | None, typer.Option(help="Where variants are made and measured: local or ray. In place of BURNISH_ENGINE.")
]
StoreOption = Annotated[
    str | None, typer.Option(help="A store that machines share: s3://bucket/prefix, say. In place of BURNISH_STORE.")
]


def demo(
    work: Annotated[Path, typer.Option(help="Where the demo works.")] = Path("burnish-work/demo"),
    level: LevelOption = None,
    json_output: Json = False,
) -> None:
    """Take a small network on handwritten digits through the whole journey.

    Example: burnish demo
    """
    from optimize.demo.prepare import prepare_demo

    say("burnish demo: a residual network reads handwritten digits; which variant should serve it?")
    _run(prepare_demo(work), work / "burnish-work", level, json_output)


def run(
    campaign: Annotated[Path | None, typer.Argument(help="The campaign file.")] = None,
    work: Work = None,
    level: LevelOption = None,
    minutes: Annotated[
        float | None, typer.Option(help="Begin nothing more after so long, and choose from what is known by then.")
    ] = None,
    engine: EngineOption = None,
    store: StoreOption = None,
    fleet: Annotated[
        Path | None, typer.Option(help="In place of a campaign: a file that names many models, each with its own.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(hidden=True, help="What paths in the campaign file are relative to; its folder.")
    ] = None,
    parent: Annotated[int | None, typer.Option(hidden=True, help="Die with this process, which started it.")] = None,
    json_output: Json = False,
) -> None:
    """Run a campaign: make variants, serve and measure them, record all of it, choose.

    The same command again goes on where it stopped, and reuses every result that is still valid. With --fleet, the
    campaigns of many models take their turns, and one report ranks what was won.

    Example: burnish run campaign.yaml --level quick
    """
    from optimize.cli.fleet import run_fleet_file
    from optimize.engines.child import die_with_parent
    from registry.errors import InputError

    if parent is not None:
        die_with_parent(parent)
    if fleet is not None and minutes is not None:
        raise InputError("--minutes is for a campaign", hint="The file of a fleet says its own: `minutes: 120`.")
    if fleet is not None and campaign is None and base is None:
        _for_processes(engine, store)
        run_fleet_file(fleet, work, level, json_output)
        return
    if campaign is None or fleet is not None:
        raise InputError("name either a campaign file, or a fleet's with --fleet")
    how: dict[str, Any] = {"base": base, "minutes": minutes, "engine": engine, "store": store}
    _run(campaign, work or campaign.parent / "burnish-work", level, json_output, **how)


def _for_processes(engine: str | None, store: str | None) -> None:
    """Has the processes of a fleet's campaigns find the engine and the store in their environment."""
    from optimize.engines.choosing import ENGINE, engine_named
    from registry.filesystems import destination_of
    from registry.shared_store import VARIABLE

    if engine is not None:
        os.environ[ENGINE] = engine_named(engine)
    if store is not None:
        destination_of(store)
        os.environ[VARIABLE] = store


def _run(
    file: Path,
    work: Path,
    level: str | None,
    json_output: bool,
    *,
    base: Path | None = None,
    minutes: float | None = None,
    engine: str | None = None,
    store: str | None = None,
) -> None:
    from optimize import reporting
    from optimize.campaign import run_campaign
    from registry.errors import NoVariantError

    config = _within(_load(file, level), minutes)
    with progress() as observer, terminable():
        campaign, page, published = run_campaign(
            config, base=base or file.parent, work=work, observer=observer, engine=engine, store=store
        )
    if json_output:
        emit_json(reporting.summary(campaign, page, published))
    else:
        reporting.show(campaign, page, published)
    if campaign.verdict.selected is None:
        # The report says it all; the exit code is for scripts.
        raise typer.Exit(NoVariantError.exit_code)


def make(
    model: Annotated[Path, typer.Argument(help="A campaign file, or an ONNX file.")],
    out: Annotated[Path, typer.Option(help="A folder for the variants, one folder each.")] = Path("variants"),
    variant: Annotated[
        list[str] | None, typer.Option(help="Only this one, beside the baseline; may be given again.")
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="For an ONNX file: samples for static int8.")] = None,
    judge: Annotated[
        bool, typer.Option("--judge", help="For a campaign file: judge their answers and time them in process, too.")
    ] = False,
    work: Work = None,
    json_output: Json = False,
) -> None:
    """Make variants, and nothing else; with --judge also what each is worth before a server is involved.

    Example: burnish make model.onnx --variant int8-dynamic --out variants
    """
    from optimize.campaign import judge_variants_of, make_variants

    with progress() as observer, terminable():
        names = tuple(variant or ())
        made, failures = make_variants(
            model, variants=names, calibration=calibration, out=out, work=work, observer=observer
        )
        judged: list[dict[str, Any]] = []
        if judge:
            judged, failures = judge_variants_of(model, variants=names, work=work, observer=observer)
    if json_output:
        emit_json({"variants": made, "failures": failures, **({"judged": judged} if judge else {})})
        return
    for entry in made:
        typer.echo(f"{entry['name']:<24} {entry['size_bytes'] / 1e6:8.2f} MB  {entry['path']}")
    for one in judged:
        typer.echo(f"{one['name']:<24} {', '.join(told(name, number) for name, number in one['metrics'].items())}")
    for failure in failures:
        typer.echo(f"{failure['subject']:<24} {failure['kind']}: {failure['reason']}")


def told(name: str, estimate: dict[str, Any]) -> str:
    """A number for a person: ``accuracy_drop 0.0011 [-0.0037, 0.0059]``."""
    ends = "" if estimate["low"] is None else f" [{estimate['low']:.4g}, {estimate['high']:.4g}]"
    return f"{name} {estimate['value']:.4g}{ends}"


def init(
    folder: Annotated[Path, typer.Argument(help="Where to write campaign.yaml.")] = Path(),
    json_output: Json = False,
) -> None:
    """Write a campaign file to start from, with every setting explained.

    Example: burnish init my-model
    """
    from optimize.demo.prepare import write_template

    path = write_template(folder)
    if json_output:
        emit_json({"campaign": str(path)})
    else:
        typer.echo(f"Wrote {path}. Name your model and samples in it, then: burnish run {path}")


def _within(config: "CampaignConfig", minutes: float | None) -> "CampaignConfig":
    """The campaign with the budget of the command line, where that names one."""
    from optimize.config import LimitsConfig
    from registry.errors import InputError

    if minutes is None:
        return config
    try:
        limits = LimitsConfig.model_validate({**config.limits.model_dump(), "minutes": minutes})
    except ValueError as error:
        raise InputError(f"--minutes {minutes:g} is no time to work in", hint="Give a number above 0.") from error
    return config.model_copy(update={"limits": limits})


def _load(file: Path, level: str | None) -> "CampaignConfig":
    from optimize.config import load_campaign

    config = load_campaign(file)
    return config if level is None else config.model_copy(update={"level": level})
