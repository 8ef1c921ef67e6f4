"""``burnish lint``: whether a model is ready for TensorRT, or for a release of Triton, or a folder for Core 2."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optimize.cli.output import (
    IdentityOption,
    IssuerOption,
    Json,
    PublicKeyOption,
    TrustConfigOption,
    emit_json,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from profiles.serving.roundtrip import Finding
    from registry.keyless import SignerIdentity


def lint(
    model: Annotated[Path | None, typer.Argument(help="An ONNX file; not with --core2.")] = None,
    tensorrt: Annotated[str | None, typer.Option(help="10, 11, or a minor version: 10.14.")] = None,
    triton: Annotated[str | None, typer.Option(help="A release of Triton, for its onnxruntime backend: 23.03.")] = None,
    shapes: Annotated[list[str] | None, typer.Option(help="input=min,opt,max of the engine; once an input.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, float16, bfloat16 or int8.")] = None,
    max_batch_size: Annotated[int | None, typer.Option(help="The server's.")] = None,
    config: Annotated[Path | None, typer.Option(help="With --tensorrt: the config.pbtxt of a Triton on a GPU.")] = None,
    core2: Annotated[Path | None, typer.Option(help="A folder that storageUri is to point to.")] = None,
    server: Annotated[str | None, typer.Option(help="mlserver or triton, where the folder leaves it open.")] = None,
    uri: Annotated[
        str | None, typer.Option(help="The storageUri itself; alone, also what MLflow keeps: models:/digits/3.")
    ] = None,
    remote: Annotated[list[str] | None, typer.Option(help="An rclone remote of the cluster; once each.")] = None,
    passport: Annotated[Path | None, typer.Option(help="A variant's passport; not with a model.")] = None,
    public_key: PublicKeyOption = None,
    identity: IdentityOption = None,
    issuer: IssuerOption = None,
    trust_config: TrustConfigOption = None,
    artifact: Annotated[Path | None, typer.Option(help="A folder that must hold just the variant's files.")] = None,
    work: Annotated[Path | None, typer.Option(help="A campaign's folder: its record must say the same.")] = None,
    json_output: Json = False,
) -> None:
    """Check a model by static rules: what TensorRT or Triton would refuse, run badly, or never fuse.

    With --core2, check a folder instead: which settings Seldon Core 2 would lose, overwrite or refuse. With --uri
    alone, check whether Core 2 can fetch from it, and say where an artifact of MLflow's is. With --passport, check what
    a passport says: its signature, a variant's files, a campaign's record.

    Exit code 5 where a rule finds an error; warnings and remarks leave it at 0.

    Example: burnish lint model.onnx --tensorrt 11 --shapes x=1x8,8x8,16x8
    """
    from optimize.readiness.lint import lint as find
    from registry.errors import CheckFailedError, InputError

    if passport is not None:
        if model is not None or core2 is not None:
            raise InputError("--passport is a check of its own", hint="Run lint twice.")
        from optimize.passports import named_signer

        signer = named_signer(public_key, identity, issuer, trust_config)
        _lint_passport(passport, signer, artifact, work, json_output=json_output)
        return
    if public_key or identity or issuer or trust_config or artifact or work:
        raise InputError(
            "--public-key, --identity, --issuer, --trust-config, --artifact and --work are for a passport",
            hint="Name it with --passport.",
        )
    if core2 is not None:
        given = {"a model": model, "--tensorrt": tensorrt, "--triton": triton, "--shapes": shapes,
                 "--config": config}  # fmt: skip
        if other := next((name for name, value in given.items() if value), None):
            raise InputError(f"--core2 is a check of a folder, and does not go with {other}", hint="Run lint twice.")
        _lint_folder(core2, server, uri, remote, json_output=json_output)
        return
    if uri is not None and model is None:
        _lint_uri(uri, remote, json_output=json_output)
        return
    if model is None:
        raise InputError("there is nothing to check", hint="Name an ONNX file, or a folder with --core2.")
    if server or uri or remote:
        raise InputError("--server, --uri and --remote are for Core 2", hint="Name the folder with --core2.")
    findings = find(
        model,
        tensorrt=tensorrt,
        triton=triton,
        shapes=shapes or (),
        precision=_precision(precision),
        max_batch_size=max_batch_size,
        config=config,
    )
    counts = {kind: sum(found["severity"] == kind for found in findings) for kind in ("error", "warning", "info")}
    if json_output:
        emit_json({"model": str(model), "tensorrt": tensorrt, "triton": triton, **counts, "findings": findings})
    else:
        _show(findings, counts)
    if counts["error"]:
        # The findings say it all; the exit code is for scripts.
        raise typer.Exit(CheckFailedError.exit_code)


def _lint_folder(
    folder: Path, server: str | None, uri: str | None, remotes: list[str] | None, *, json_output: bool
) -> None:
    from profiles.serving.roundtrip import check_roundtrip, guess_server
    from registry.errors import InputError

    if server not in {None, "mlserver", "triton"}:
        raise InputError(f"Core 2 has no server {server!r}", hint="It is mlserver or triton.")
    kind: Any = server or guess_server(folder)
    findings = check_roundtrip(folder, kind, uri=uri, remotes=remotes)
    _tell(findings, {"folder": str(folder), "server": kind, "uri": uri}, json_output=json_output)


def _lint_uri(uri: str, remotes: list[str] | None, *, json_output: bool) -> None:
    from profiles.deploy.storage_uris import resolve
    from profiles.serving.roundtrip import check_uri
    from registry.filesystems import MLFLOW_SCHEMES, scheme_of

    storage = uri
    if scheme_of(uri) in MLFLOW_SCHEMES:
        storage = resolve(uri, remotes=dict.fromkeys(("s3", "gs"), remotes[0]) if remotes else None)
        if not json_output:
            typer.echo(f"{uri} is {storage} to the cluster's rclone")
    _tell(check_uri(storage, remotes=remotes), {"uri": uri, "storage_uri": storage}, json_output=json_output)


def _tell(findings: "Sequence[Finding]", about: dict[str, Any], *, json_output: bool) -> None:
    """Shows what Core 2 would do, and ends with exit code 5 where a finding is an error."""
    from dataclasses import asdict

    from registry.errors import CheckFailedError

    counts = {level: sum(found.severity == level for found in findings) for level in ("error", "warning", "info")}
    if json_output:
        emit_json({**about, **counts, "findings": [asdict(found) for found in findings]})
    else:
        for found in findings:
            where = f"{found.file} {found.key}".rstrip()
            typer.echo(f"{found.rule} {found.severity:<7} {where}: {found.message}")
            if found.way:
                typer.echo(f"     fix {found.way}")
        typer.echo(f"{counts['error']} errors, {counts['warning']} warnings, {counts['info']} remarks")
    if counts["error"]:
        raise typer.Exit(CheckFailedError.exit_code)


def _lint_passport(
    passport: Path,
    signer: "Path | SignerIdentity | None",
    artifact: Path | None,
    work: Path | None,
    *,
    json_output: bool,
) -> None:
    from optimize.passports import check_passport
    from registry.errors import CheckFailedError

    told = check_passport(passport, signer=signer, artifact=artifact, work=work)
    if json_output:
        emit_json(told)
    elif told["passed"]:
        typer.echo(f"{passport}: genuine; {told['variant']}: {told['verdict']}")
    else:
        typer.echo("\n".join(f"{passport}: {finding}" for finding in told["findings"]))
    if not told["passed"]:
        raise typer.Exit(CheckFailedError.exit_code)


def _precision(given: str | None) -> Any:
    from typing import get_args

    from optimize.readiness.rules import Precision
    from registry.errors import InputError

    if given is not None and given not in get_args(Precision):
        raise InputError(f"there is no precision {given!r}", hint=f"It is {', '.join(get_args(Precision))}.")
    return given


def _show(findings: list[dict[str, Any]], counts: dict[str, int]) -> None:
    for found in findings:
        typer.echo(f"{found['rule']} {found['severity']:<7} {found['message']}  [{found['versions']}]")
        if found["nodes"]:
            more = len(found["nodes"]) - 5
            typer.echo("     at  " + ", ".join(found["nodes"][:5]) + (f" and {more} more" if more > 0 else ""))
        typer.echo(f"     fix {found['fix']}")
    typer.echo(f"{counts['error']} errors, {counts['warning']} warnings, {counts['info']} remarks")
