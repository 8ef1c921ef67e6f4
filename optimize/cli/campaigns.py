"""``burnish demo``, ``init``, ``make`` and ``run``: campaigns, and parts of them."""

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
    campaign: Annotated[Path, typer.Argument(help="The campaign file.")],
    work: Work = None,
    level: LevelOption = None,
    json_output: Json = False,
) -> None:
    """Run a campaign: make variants, serve and measure them, record all of it, choose.

    The same command again goes on where it stopped, and reuses every result that is still valid.

    Example: burnish run campaign.yaml --level quick
    """
    _run(campaign, work or campaign.parent / "burnish-work", level, json_output)


def _run(file: Path, work: Path, level: str | None, json_output: bool) -> None:
    from optimize import reporting
    from optimize.campaign import run_campaign
    from registry.errors import NoVariantError

    config = _load(file, level)
    with progress() as observer, terminable():
        campaign, page, published = run_campaign(config, base=file.parent, work=work, observer=observer)
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
    variant: Annotated[list[str] | None, typer.Option(help="Only this one; may be given again.")] = None,
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


def _load(file: Path, level: str | None) -> "CampaignConfig":
    from optimize.config import load_campaign

    config = load_campaign(file)
    return config if level is None else config.model_copy(update={"level": level})
