"""``burnish tensorrt``: the engine and the Triton settings of a variant for TensorRT."""

from pathlib import Path
from typing import Annotated

import typer

from optimize.cli.endings import terminable
from optimize.cli.output import Json, emit_json


def tensorrt(
    variant: Annotated[Path, typer.Argument(help="The folder of a variant that tensorrt.prepare made.")],
    out: Annotated[Path, typer.Option(help="A folder for the models: new, or empty.")] = Path("repository"),
    name: Annotated[str | None, typer.Option(help="Of the models; the variant's folder's if not given.")] = None,
    max_batch_size: Annotated[int | None, typer.Option(min=1, help="1: none; else the profile's largest.")] = None,
    max_batch_delay_ms: Annotated[float, typer.Option(min=0, help="How long a request waits for company.")] = 0.0,
    instances: Annotated[int, typer.Option(min=1, help="Of each model on each GPU.")] = 1,
    engine_cache: Annotated[str, typer.Option(help="The server's folder for ONNX Runtime's engines.")] = (
        "/mnt/trt-cache"
    ),
    timeout_s: Annotated[float, typer.Option(min=1, help="Longest time for trtexec.")] = 3600.0,
    json_output: Json = False,
) -> None:
    """Build a variant's TensorRT engine where there is a GPU, and write the Triton models that serve it.

    Two models are written: one of the engine, and one of ONNX Runtime with its TensorRT provider. Without a GPU or
    trtexec the engine is left out with the reason, and the commands that build it are shown.

    Example: burnish tensorrt variants/int8-tensorrt --out repository
    """
    from optimize.tensorrt_serving import lines, write_repository

    with terminable():
        told = write_repository(
            variant, out, name=name, max_batch_size=max_batch_size, max_batch_delay_ms=max_batch_delay_ms,
            instances=instances, engine_cache=engine_cache, timeout_s=timeout_s,
        )  # fmt: skip
    if json_output:
        emit_json({"variant": str(variant), **told})
    else:
        typer.echo("\n".join(lines(told, variant)))
