"""Whether the load generator is woken before others, which not every user is permitted."""

import os

PRIORITY = -10


def go_first() -> bool:
    """Wakes this process before others from now on; False, and nothing is changed, where that is not permitted."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
    except OSError:
        return False
    return True


def may_go_first() -> bool:
    """Whether `go_first` is permitted here, found by trying: a capability may be there and still not count."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    if not go_first():
        return False
    os.setpriority(os.PRIO_PROCESS, 0, before)
    return True
