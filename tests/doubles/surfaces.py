"""Throughput of made-up servers under a closed loop, as a law with a known optimum: what a search is tried on."""

import math
from dataclasses import dataclass

from profiles.search import InProcessCurve, lanes
from registry.records import ServingProfile

CORES = 2


@dataclass(frozen=True)
class MadeUpServer:
    """A model and a server, in milliseconds.

    Attributes:
        call: of the session for each batch.
        row: of the session for each row in it.
        grpc: of a request over gRPC, which one thread of the server handles.
        rest: the same over REST.
        pool: of a request that is passed to a worker process.
        parallel: the share of the session's work that a second thread halves.
        clients: how many requests there are at any time.
    """

    call: float
    row: float
    grpc: float
    rest: float
    pool: float = 0.3
    parallel: float = 0.8
    clients: int = 32

    def session_ms(self, rows: float, threads: int) -> float:
        """Time of the session for one batch."""
        return (self.call + self.row * rows) * (1 - self.parallel + self.parallel / threads)

    def curve(self) -> InProcessCurve:
        """What is measured in process."""
        sizes, threads = (1, 2, 4, 8, 16, 32), (1, 2)
        return InProcessCurve(
            rows_per_s={(size, n): 1000 * size / self.session_ms(size, n) for size in sizes for n in threads}
        )

    def rps(self, profile: ServingProfile) -> float:
        """Requests a second: the least of what lanes, handling thread and cores let through."""
        count = lanes(profile)
        waiting = self.clients / count
        rows = min(profile.max_batch_size, waiting)
        session = self.session_ms(rows, profile.threads)
        # A batch that cannot fill while another is computed waits for its delay, in part.
        missing = max(0.0, profile.max_batch_size - waiting / 2) / profile.max_batch_size
        delay = profile.max_batch_delay_ms * missing if profile.max_batch_size > 1 else 0.0
        pooled = profile.server == "triton" or profile.parallel_workers > 0
        handling = (self.grpc if profile.protocol == "grpc" else self.rest) + self.pool * pooled
        in_process = handling if not pooled else 0.0
        of_lanes = count * rows / (session + delay + in_process * rows)
        busy = session * profile.threads / rows + handling
        return 1000 / math.fsum(one**4 for one in (1 / of_lanes, handling, busy / CORES)) ** 0.25


SERVERS = {
    # The session's overhead for a call is large, so that batches of 16 are several times as fast.
    "batching pays": MadeUpServer(call=4.0, row=0.4, grpc=0.3, rest=0.4),
    # A row costs the same in any batch, and waiting for company is lost time.
    "batching hurts": MadeUpServer(call=0.02, row=3.0, grpc=0.3, rest=0.5, clients=8),
    # Little is gained by threads, much by processes.
    "workers pay": MadeUpServer(call=0.5, row=6.0, grpc=0.3, rest=0.4, pool=0.1, parallel=0.1),
    # A tiny model behind large requests: nearly all is protocol.
    "payload decides": MadeUpServer(call=0.03, row=0.02, grpc=0.8, rest=6.0),
    # A tiny model that a worker process only slows down.
    "workers hurt": MadeUpServer(call=0.05, row=0.05, grpc=0.25, rest=0.35, pool=1.0),
    "threads pay": MadeUpServer(call=1.0, row=8.0, grpc=0.4, rest=0.5, pool=2.0, parallel=0.97, clients=4),
}
