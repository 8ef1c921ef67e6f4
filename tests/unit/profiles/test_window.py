"""One load on the event loop of this process, through a transport that says just what a test has it say."""

import asyncio
import time
from collections.abc import Callable

from profiles.load.payloads import Payload
from profiles.load.transports import Reply, Status
from profiles.load.window import Offered, Window
from registry.records import ClosedLoop, LoadProfile
from tests.doubles.busy import undisturbed


class Saying:
    """Answers every request at once, each time the same."""

    in_flight = 0

    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    async def open(self, timeout_s: float) -> None:
        """Is open."""

    def send(self, payload: Payload, timeout_s: float, then: Callable[[Reply], None]) -> None:
        """Has an answer in the loop's next turn."""
        asyncio.get_running_loop().call_soon(then, self._reply)

    async def infer(self, payload: Payload, timeout_s: float) -> Reply:
        """Has an answer."""
        return self._reply

    async def close(self) -> None:
        """Is closed."""


def offered(reply: Reply) -> Offered:
    profile = LoadProfile(
        name="w", load=ClosedLoop(concurrency=1), warmup_s=0.0, duration_s=0.02, timeout_s=0.25, seed=1
    )

    async def run() -> Offered:
        return await Window(Saying(reply), (Payload(body=b"x"),), profile).run(time.perf_counter_ns())

    return asyncio.run(run())


def test_the_first_failure_is_told_with_the_limit_of_the_load_not_with_what_was_left_of_it() -> None:
    def told(reply: Reply) -> str:
        return undisturbed(lambda: offered(reply).first_error, bool)

    assert told(Reply(Status.TIMEOUT, message="no answer in time")) == "no answer within 0.25 s of when it was due"
    assert told(Reply(Status.STATUS, message="HTTP 500: oh")) == "HTTP 500: oh"
    assert offered(Reply(Status.OK, b"fine")).first_error == ""
