"""The errors of burnish.

::

    BurnishError                  exit 1 unless a subclass says otherwise
    ├── InputError                exit 2  the user's input is wrong, or refused
    │   ├── DocumentError                 a YAML file: names file, line and key
    │   ├── PolicyError                   a policy line: points at the word
    │   ├── MissingExtraError             an optional dependency is not installed
    │   └── UntrustedModelError           a model that asks for more than a model may
    ├── NoVariantError            exit 3  nothing meets the policy, or all is unknown
    ├── BudgetUsedUpError         exit 3  no time was left to begin something; in a campaign it is unknown then
    ├── UnreachableError          exit 4  a server, cluster or store refused or did not answer
    │   ├── ServerDiedError               a server process ended while it was needed
    │   ├── GeneratorLostError            the load generator's process ended, twice for the same window
    │   └── StorageError                  burnish's own working folder cannot be written or read
    ├── CheckFailedError          exit 5  a check found something
    ├── StageError                        a stage failed; becomes a Failure record in a campaign
    │   ├── NotApplicableError            the stage cannot apply to this model: a verdict, not a fault
    │   └── StageContractError            the stage broke its own promise: a bug in the stage
    └── InterruptedCampaignError  exit 130 or 143

A message says what is wrong, with which value, and (in ``hint``) what to do.
"""


class BurnishError(Exception):
    """The root of all errors that burnish raises on purpose.

    Attributes:
        message: what is wrong, with the value that is wrong.
        hint: what the user can do about it, or None.
    """

    kind = "error"
    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n{self.hint}"


class InputError(BurnishError):
    """The user's input is wrong or refused."""

    kind = "input"
    exit_code = 2


class DocumentError(InputError):
    """A YAML document is malformed or does not fit its model."""

    kind = "document"


class PolicyError(InputError):
    """A line of the policy cannot be understood."""

    kind = "policy"


class MissingExtraError(InputError):
    """A library that this work needs is not installed."""

    kind = "missing_extra"

    def __init__(self, what: str, *, extra: str) -> None:
        super().__init__(
            f"{what} needs the extra {extra!r}, which is not installed.",
            hint=f"Install it with: pip install 'burnish[{extra}]'",
        )
        self.extra = extra


class UntrustedModelError(InputError):
    """A model asks for more than a model may: a pickle, a path outside its folder, unknown code."""

    kind = "untrusted_model"


class NoVariantError(BurnishError):
    """No variant meets the policy, or what is known does not suffice to say so."""

    kind = "no_variant"
    exit_code = 3


class BudgetUsedUpError(BurnishError):
    """A campaign's time was used up before something was begun; what it would have said is unknown."""

    kind = "budget"
    exit_code = 3


class UnreachableError(BurnishError):
    """A server, cluster or store could not be reached, or refused."""

    kind = "unreachable"
    exit_code = 4


class ServerDiedError(UnreachableError):
    """A server process ended while it was needed."""

    kind = "server_died"


class GeneratorLostError(UnreachableError):
    """The load generator's own process ended unasked, again after it was started anew; no server's fault."""

    kind = "generator_lost"


class StorageError(UnreachableError):
    """burnish's own working folder cannot be written or read: a full disk, say. No fault of what was worked on."""

    kind = "storage"


class CheckFailedError(BurnishError):
    """A check ran to its end and found something."""

    kind = "check_failed"
    exit_code = 5


class StageError(BurnishError):
    """A stage could not make its artifact."""

    kind = "stage"


class NotApplicableError(StageError):
    """A stage cannot apply to this model; a campaign records it and goes on."""

    kind = "not_applicable"


class StageContractError(StageError):
    """A stage broke the promise it made; the fault is the stage's."""

    kind = "stage_contract"


class InterruptedCampaignError(BurnishError):
    """A campaign, or what is done with its outcome, was interrupted; the hint says how to go on."""

    kind = "interrupted"

    def __init__(
        self, message: str, *, hint: str = "The same command goes on where it stopped.", exit_code: int = 130
    ) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code
