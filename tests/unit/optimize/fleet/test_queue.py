"""The queue of a fleet, simulated: nothing here takes any time."""

import heapq
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from optimize.fleet.queue import FairQueue, Ticket


def tickets(groups: dict[str, int], minutes: float | None = None) -> list[Ticket]:
    return [
        Ticket(name=f"{group}{number}", group=group, minutes=minutes)
        for group, count in groups.items()
        for number in range(count)
    ]


@dataclass
class Simulated:
    """What became of a queue that was worked off."""

    order: list[str] = field(default_factory=list)
    began: dict[str, float] = field(default_factory=dict)
    allotted: dict[str, float | None] = field(default_factory=dict)
    end: float = 0.0


def work_off(
    queue: FairQueue, takes: dict[str, float], *, parallel: int = 1, fleet_minutes: float | None = None
) -> Simulated:
    """Every campaign takes as long as it would, or as long as it may."""
    found, now, running = Simulated(), 0.0, []
    while queue or running:
        while queue and len(running) < parallel:
            left = None if fleet_minutes is None else fleet_minutes - now
            if left is not None and left <= 0:
                break
            elapsed = {name: now - found.began[name] for _, name in running}
            ticket = queue.take(elapsed)
            allotted = queue.allot(ticket, left=left, parallel=parallel, elapsed=elapsed)
            found.order.append(ticket.name)
            found.began[ticket.name] = now
            found.allotted[ticket.name] = allotted
            lasts = takes[ticket.name] if allotted is None else min(takes[ticket.name], allotted)
            heapq.heappush(running, (now + lasts, ticket.name))
        if not running:
            break
        now, name = heapq.heappop(running)
        queue.ended(name, now - found.began[name])
    found.end = now
    return found


def test_groups_of_equal_share_take_turns_whatever_their_number():
    queue = FairQueue(tickets({"vision": 6, "text": 2}))
    done = work_off(queue, dict.fromkeys([ticket.name for ticket in queue.waiting], 10.0))
    assert done.order == [
        "vision0", "text0", "vision1", "text1", "vision2", "vision3", "vision4", "vision5",
    ]  # fmt: skip


def test_a_group_of_twice_the_share_gets_twice_the_minutes():
    queue = FairQueue(tickets({"big": 8, "small": 4}), groups={"big": 2.0})
    done = work_off(queue, dict.fromkeys([ticket.name for ticket in queue.waiting], 5.0))
    assert sum(name.startswith("big") for name in done.order[:9]) == 6


def test_long_campaigns_of_one_group_let_short_ones_of_another_go_first():
    queue = FairQueue(tickets({"long": 3, "short": 6}))
    done = work_off(queue, {ticket.name: 60.0 if ticket.group == "long" else 10.0 for ticket in queue.waiting})
    assert done.order == ["long0", "short0", "short1", "short2", "short3", "short4", "short5", "long1", "long2"]


def test_what_a_group_used_before_counts():
    queue = FairQueue(tickets({"a": 2, "b": 2}), used={"a": 25.0})
    done = work_off(queue, dict.fromkeys(["a0", "a1", "b0", "b1"], 10.0))
    assert done.order == ["b0", "b1", "a0", "a1"]


def test_those_that_begin_at_the_same_time_are_of_different_groups():
    queue = FairQueue(tickets({"a": 3, "b": 3}))
    assert [queue.take({}).group for _ in range(4)] == ["a", "b", "a", "b"]


def test_larger_shares_come_first_in_a_group_then_the_order_of_the_file():
    waiting = [Ticket(name=name, group="", share=share) for name, share in (("x", 1), ("y", 3), ("z", 1), ("w", 3))]
    queue = FairQueue(waiting)
    assert [queue.take({}).name for _ in range(4)] == ["y", "w", "x", "z"]


def test_without_minutes_there_is_no_limit_and_a_models_own_holds():
    queue = FairQueue([Ticket(name="a", group=""), Ticket(name="b", group="", minutes=7.0)])
    done = work_off(queue, {"a": 100.0, "b": 100.0})
    assert done.allotted == {"a": None, "b": 7.0}


def test_the_minutes_of_a_fleet_are_divided_and_what_is_left_over_goes_on():
    queue = FairQueue(tickets({"": 4}))
    done = work_off(queue, {"0": 2.0, "1": 99.0, "2": 99.0, "3": 99.0}, fleet_minutes=60.0)
    assert done.allotted["0"] == 15.0
    assert [round(done.allotted[name] or 0, 3) for name in ("1", "2", "3")] == [19.333, 19.333, 19.333]
    assert done.end <= 60.0


def test_as_many_models_as_places_get_all_the_time_there_is():
    queue = FairQueue(tickets({"a": 1, "b": 1}))
    done = work_off(queue, {"a0": 99.0, "b0": 99.0}, parallel=2, fleet_minutes=30.0)
    assert done.allotted == {"a0": 30.0, "b0": 30.0}


def test_several_at_a_time_leave_room_for_those_that_have_to_wait():
    done = work_off(FairQueue(tickets({"": 3})), dict.fromkeys("012", 99.0), parallel=2, fleet_minutes=60.0)
    assert done.allotted == {"0": 30.0, "1": 30.0, "2": 30.0}
    assert done.end == 60.0


SHARES = st.floats(0.1, 10.0)
QUEUES = st.lists(st.tuples(st.sampled_from("abc"), SHARES, st.none() | st.floats(1.0, 50.0)), min_size=1, max_size=12)


@given(models=QUEUES, groups=st.dictionaries(st.sampled_from("abc"), SHARES), data=st.data())
def test_everybody_gets_a_part_and_all_end_in_time(models, groups, data):
    parallel = data.draw(st.integers(1, 4))
    fleet_minutes = data.draw(st.floats(1.0, 500.0))
    waiting = [
        Ticket(name=str(number), group=group, share=share, minutes=minutes)
        for number, (group, share, minutes) in enumerate(models)
    ]
    lasts = st.just(1e6) | st.floats(0.0, 1000.0)
    takes = {ticket.name: data.draw(lasts) for ticket in waiting}
    weights = {
        ticket.name: groups.get(ticket.group, 1.0)
        * ticket.share
        / sum(other.share for other in waiting if other.group == ticket.group)
        for ticket in waiting
    }
    done = work_off(FairQueue(waiting, groups=groups), takes, parallel=parallel, fleet_minutes=fleet_minutes)

    assert sorted(done.order) == sorted(takes)  # nobody is left out
    assert done.end <= fleet_minutes * (1 + 1e-9)
    # The least that list schedules leave room for, whoever comes first and however long the others take.
    spread = sum(weights.values()) / parallel + (1 - 1 / parallel) * max(weights.values())
    for ticket in waiting:
        least = min(fleet_minutes * weights[ticket.name] / spread, fleet_minutes, ticket.minutes or fleet_minutes)
        assert done.allotted[ticket.name] >= least * (1 - 1e-9)


@settings(max_examples=40)
@given(data=st.data(), groups=st.dictionaries(st.sampled_from("abc"), SHARES, min_size=3, max_size=3))
def test_no_group_is_ahead_by_more_than_one_campaign(data, groups):
    waiting = tickets(dict.fromkeys(groups, 8))
    takes = {ticket.name: data.draw(st.floats(1.0, 30.0)) for ticket in waiting}
    queue, used = FairQueue(waiting, groups=groups), dict.fromkeys(groups, 0.0)
    left = dict.fromkeys(groups, 8)
    while all(left.values()):
        ticket = queue.take({})
        queue.ended(ticket.name, takes[ticket.name])
        used[ticket.group] += takes[ticket.name]
        left[ticket.group] -= 1
        for one in groups:
            for other in groups:
                # Start-time fairness: the one that is ahead began its last campaign when it was not.
                assert used[one] / groups[one] - used[other] / groups[other] <= 30.0 / groups[one] + 1e-9


@given(models=QUEUES)
def test_the_same_fleet_goes_the_same_way(models):
    waiting = [Ticket(name=str(n), group=group, share=share) for n, (group, share, _) in enumerate(models)]
    takes = {ticket.name: float(ticket.share) for ticket in waiting}
    first, second = (work_off(FairQueue(waiting), takes, parallel=2).order for _ in range(2))
    assert first == second
