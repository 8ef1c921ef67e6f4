"""The typer application: one module a command group."""

import typer

from optimize.cli import (
    cache,
    campaigns,
    check,
    compare,
    explain,
    hosts,
    job,
    lint,
    models,
    pipeline,
    promote,
    rebuild,
    render,
    reports,
    select,
    serving,
    status,
    tensorrt,
)

# Rich markup in help doubles the start-up time; plain help reads as well.
app = typer.Typer(
    name="burnish",
    help="Takes a trained model to the variant that should serve it on Seldon Core 2, with proof.",
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("demo")(campaigns.demo)
app.command("init")(campaigns.init)
app.command("inspect")(models.inspect)
app.command("make")(campaigns.make)
app.command("run")(campaigns.run)
app.command("status")(status.status)
app.command("render")(render.render)
app.command("serve")(serving.serve)
app.command("bench")(serving.bench)
app.command("check")(check.check)
app.command("compare")(compare.compare)
app.command("report")(reports.report)
app.command("explain")(explain.explain)
app.command("select")(select.select)
app.command("promote")(promote.promote)
app.command("rollback")(promote.rollback)
app.command("history")(promote.history)
app.command("rebuild")(rebuild.rebuild)
app.add_typer(cache.app, name="cache")
app.add_typer(job.app, name="job")
app.add_typer(pipeline.app, name="pipeline")
app.command("lint")(lint.lint)
app.command("tensorrt")(tensorrt.tensorrt)
app.command("doctor")(hosts.doctor)
