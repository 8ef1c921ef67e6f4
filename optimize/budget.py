"""A campaign's time: how long one run of it may begin work."""

import math
from dataclasses import dataclass, replace
from time import monotonic, time

from registry.errors import BudgetUsedUpError

PREPARING = 0.5
"""The share of a budget that may go into what comes before measuring: a variant that is only made decides nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How long work may be begun; what runs when it is used up ends by its own limits.

    Attributes:
        minutes: as the campaign has them; None for no end.
        deadline: when nothing more is begun, by the monotonic clock.
        kept_s: what the deadline leaves for something else.
        kept_for: what that is.
    """

    minutes: float | None = None
    deadline: float = math.inf
    kept_s: float = 0.0
    kept_for: str = ""

    @classmethod
    def from_now(cls, minutes: float | None) -> "Budget":
        """A budget that begins now."""
        return cls() if minutes is None else cls(minutes=minutes, deadline=monotonic() + 60 * minutes)

    @property
    def left_s(self) -> float:
        """Seconds until it is used up, at least 0; infinite where there is no end."""
        return max(0.0, self.deadline - monotonic())

    @property
    def is_used_up(self) -> bool:
        """Whether nothing more is to be begun."""
        return self.left_s <= 0

    @property
    def begin_by(self) -> float | None:
        """When it is used up, in seconds since 1970, as other machines know the time; None where there is no end."""
        return None if self.minutes is None else time() + self.left_s

    @property
    def error(self) -> BudgetUsedUpError:
        """Why something is not begun."""
        kept = self.deadline + self.kept_s > monotonic()
        return BudgetUsedUpError(
            f"the budget of {self.minutes or 0:g} minutes was used up"
            + (f", but for what is kept for {self.kept_for}" if kept and self.kept_for else ""),
            hint="The same command with more minutes goes on where it stopped.",
        )

    def check(self) -> None:
        """Returns where something more may be begun.

        Raises:
            BudgetUsedUpError: it is used up.
        """
        if self.is_used_up:
            raise self.error

    def keeping(self, seconds: float, kept_for: str) -> "Budget":
        """The same that ends so many seconds before, which are kept for something else."""
        return replace(self, deadline=self.deadline - seconds, kept_s=seconds, kept_for=kept_for)

    def preparing(self) -> "Budget":
        """The part of what is left that may go into what comes before measuring."""
        return self if self.minutes is None else self.keeping((1 - PREPARING) * self.left_s, "measuring")


UNLIMITED = Budget()
"""Of a campaign that may take as long as it takes."""
