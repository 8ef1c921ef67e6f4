"""``burnish doctor``: what this host has, and what burnish will use."""

import typer

from optimize.cli.output import ClusterOption, Json, emit_json


def doctor(cluster: ClusterOption = None, json_output: Json = False) -> None:
    """Say what this host has, and what burnish will use of it; of a Core 2, whether it is ready.

    Example: burnish doctor
    """
    from optimize.diagnosis import diagnose

    findings = diagnose(cluster)
    if json_output:
        emit_json(findings)
        return
    for section, entries in findings.items():
        typer.echo(section)
        for name, finding in entries.items():
            typer.echo(f"  {name:<16} {finding}")
