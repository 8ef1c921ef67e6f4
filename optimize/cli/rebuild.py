"""``burnish rebuild``: a variant made again from its passport."""

from pathlib import Path
from typing import Annotated

import typer

from optimize.cli.endings import terminable
from optimize.cli.output import (
    IdentityOption,
    IssuerOption,
    Json,
    PublicKeyOption,
    TrustConfigOption,
    emit_json,
    progress,
)


def rebuild(
    passport: Annotated[Path, typer.Argument(help="The variant's passport.")],
    public_key: PublicKeyOption = None,
    identity: IdentityOption = None,
    issuer: IssuerOption = None,
    trust_config: TrustConfigOption = None,
    campaign: Annotated[Path, typer.Option(help="Names the source and the samples.")] = Path("campaign.yaml"),
    artifact: Annotated[Path | None, typer.Option(help="The variant's files, to compare answers with.")] = None,
    out: Annotated[Path | None, typer.Option(help="A new folder for what is made.")] = None,
    json_output: Json = False,
) -> None:
    """Make a variant again from its passport and the source, and prove it equal: in bytes, or else in its answers.

    Exit code 5 where it is not equal, or the passport is not genuine.

    Example: burnish rebuild int8-static.passport.json --public-key key.pub.pem --campaign campaign.yaml
    """
    from optimize.passports import named_signer
    from optimize.rebuild import rebuild as make_again
    from registry.errors import CheckFailedError

    signer = named_signer(public_key, identity, issuer, trust_config)
    with progress() as observer, terminable():
        rebuilt = make_again(
            passport, signer=signer, campaign_file=campaign, original=artifact, out=out, observer=observer
        )
    if json_output:
        emit_json(
            {"variant": rebuilt.variant.name, "id": rebuilt.variant.id, "digest": rebuilt.variant.artifact.digest,
             "equal": rebuilt.equal, "findings": list(rebuilt.findings)}
        )  # fmt: skip
    else:
        equal = f"equal in {rebuilt.equal}" if rebuilt.equal else "not proved equal"
        typer.echo("\n".join([f"{rebuilt.variant.name}: {equal}", *(f"  {one}" for one in rebuilt.findings)]))
    if rebuilt.equal is None:
        raise typer.Exit(CheckFailedError.exit_code)
