"""The command line: wires ports to adapters. Nothing heavy is imported before a command runs."""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from optimize.cli.endings import Terminated
from registry.errors import BurnishError, InputError, InterruptedCampaignError
from registry.full_disk import full_disk_error


def main() -> NoReturn:
    """Runs ``burnish`` with the arguments of this process, and exits with the code of its outcome."""
    arguments = sys.argv[1:]
    # What libraries would send home stays here: MLflow, and OpenVINO, which knows no other word for it.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("CI", "true")
    try:
        _check_names()
        _run(arguments)
    except BurnishError as error:
        _fail(arguments, error.kind, error.message, error.hint, error.exit_code)
    except (KeyboardInterrupt, Terminated) as ending:
        code = 143 if isinstance(ending, Terminated) else 130
        told = InterruptedCampaignError("Interrupted.", exit_code=code)
        _fail(arguments, told.kind, told.message, told.hint, code)
    except Exception as error:
        if (full := full_disk_error(error)) is not None:
            _fail(arguments, full.kind, full.message, full.hint, full.exit_code)
        traceback.print_exc()  # a bug: it is for whoever mends it
        _fail(arguments, "bug", f"{type(error).__name__}: {error}", "This is a fault of burnish.", 1)
    sys.exit(0)


def _run(arguments: list[str]) -> None:
    import typer

    from optimize.cli.app import app

    try:
        code = typer.main.get_command(app).main(arguments, prog_name="burnish", standalone_mode=False)
    except typer.TyperException as error:
        # What typer itself raises is always a word on the command line that it cannot take.
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        hint = "See `burnish --help`, and `burnish COMMAND --help` for an example."
        raise InputError(message or "no command was given", hint=hint) from error
    except typer.Abort:
        raise KeyboardInterrupt from None
    if isinstance(code, int) and code:
        sys.exit(code)


def _fail(arguments: list[str], kind: str, message: str, hint: str | None, exit_code: int) -> NoReturn:
    if "--json" in arguments:
        sys.stdout.write(json.dumps({"error": {"kind": kind, "message": message, "hint": hint}}) + "\n")
    else:
        sys.stderr.write(f"burnish: {message}\n" + (f"  {hint}\n" if hint else ""))
    sys.exit(exit_code)


def _check_names() -> None:
    """Our packages have everyday names: a folder of the same name must not stand in for one of them."""
    import optimize
    import profiles
    import registry

    homes = {module.__name__: Path(module.__path__[0]).parent for module in (optimize, profiles, registry)}
    if len(set(homes.values())) > 1:
        listed = ", ".join(f"{name} from {home}" for name, home in homes.items())
        raise InputError(
            f"burnish's packages come from different places: {listed}",
            hint="A folder named optimize, profiles or registry stands before burnish's on the module path; "
            "run `burnish` itself, or `python -P -m optimize`, from another folder.",
        )
