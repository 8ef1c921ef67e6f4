"""``burnish inspect``: what a model file is."""

from pathlib import Path
from typing import Annotated

import typer

from optimize.cli.output import Json, emit_json


def inspect(
    model: Annotated[Path, typer.Argument(help="An ONNX file, or an OpenVINO .xml.")],
    json_output: Json = False,
) -> None:
    """Show a model's tensors, operators and size.

    Example: burnish inspect model.onnx
    """
    from optimize.inspection import describe

    description = describe(model)
    if json_output:
        emit_json(description)
        return
    typer.echo(f"{model}  {description['format']}  {description['size_bytes'] / 1e6:.2f} MB")
    for kind in ("inputs", "outputs"):
        for tensor in description[kind]:
            shape = ", ".join("?" if dim is None else str(dim) for dim in tensor["shape"])
            typer.echo(f"  {kind[:-1]:<7} {tensor['name']}  {tensor['dtype']}[{shape}]")
    if "opsets" in description:
        typer.echo(
            "  opset   " + ", ".join(f"{domain or 'ai.onnx'} {v}" for domain, v in description["opsets"].items())
        )
    kept = [name if (model.parent / name).is_file() else f"{name} (missing)" for name in description["beside"]]
    typer.echo(f"  weights {description['parameters']:,}" + (f" in {', '.join(kept)}" if kept else ""))
    typer.echo("  nodes   " + ", ".join(f"{name} {count}" for name, count in description["operators"].items()))
