"""How long messages wait at a step: exactly along a sampled path, and by formula.

A step with c servers (worker processes, instances, replicas) that takes messages in their order is a G/G/c queue. Its
sojourn times follow from arrivals and service times by a recursion: D. V. Lindley, "The Theory of Queues with a Single
Server", 1952, for one server; J. Kiefer and J. Wolfowitz, "On the Theory of Queues with Many Servers", 1955, for
several. The formulas are A. K. Erlang's for M/M/c (1917), and for others the scaling by variability of A. O. Allen,
"Probability, Statistics and Queueing Theory", 1978, after Cunneen: exact for M/M/c and, by Pollaczek and Khinchine, for
M/G/1; near for the rest.
"""

import heapq
import math

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]


def departures(arrivals: Times, services: Times, servers: int) -> Times:
    """When each message leaves a queue of ``servers`` that serve in the order of arrival.

    Args:
        arrivals: rising times, shape (messages,).
        services: how long each takes, same shape and unit.
        servers: how many serve side by side, at least 1.
    """
    if servers == 1:
        worked = np.cumsum(services)
        # Work done by the end of n, and the latest that a busy period's start can have been.
        left: Times = worked + np.maximum.accumulate(arrivals - worked + services)
        return left
    free = [-math.inf] * servers
    ends = np.empty(len(arrivals))
    for n, (arrival, service) in enumerate(zip(arrivals.tolist(), services.tolist(), strict=True)):
        done = max(arrival, free[0]) + service
        heapq.heapreplace(free, done)
        ends[n] = done
    return ends


def erlang_c(servers: int, load: float) -> float:
    """The probability that a message has to wait in M/M/c.

    Args:
        servers: c.
        load: arrival rate times mean service time, in [0, c).
    """
    blocked = 1.0
    for n in range(1, servers + 1):
        blocked = load * blocked / (n + load * blocked)
    return blocked / (1 - (load / servers) * (1 - blocked))


def mean_wait(rate: float, *, servers: int, service: float, variability: float = 1.0, arrivals: float = 1.0) -> float:
    """The mean wait before service begins, in the unit of ``service``; infinite from saturation on.

    Args:
        rate: messages in a unit of time.
        servers: that serve side by side.
        service: mean time of one.
        variability: variance of service times over their mean's square.
        arrivals: the same of the times between arrivals; 1 for Poisson.
    """
    load = rate * service
    if load <= 0:
        return 0.0
    if load >= servers:
        return math.inf
    return erlang_c(servers, load) * service / (servers - load) * (arrivals + variability) / 2
