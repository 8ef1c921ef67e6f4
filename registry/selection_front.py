"""The Pareto front: what no other beats on every axis."""

from collections.abc import Mapping, Sequence


def pareto_front(points: Mapping[str, Sequence[float]]) -> tuple[str, ...]:
    """The names whose point no other point beats: none is as good on every axis and better on one. More is better.

    Points are looked at by falling sum of their ranks on all axes, so that whatever beats a point comes before it, and
    each that is still in when its turn comes puts out all that it beats; those near the top put out most at once
    (sort-filter-skyline: Chomicki, Godfrey, Gryz and Liang, "Skyline with Presorting", 2003).

    Args:
        points: name -> coordinates, of the same number for each.

    Returns:
        The names in the order of ``points``; equal points are all in or all out.
    """
    import numpy as np

    values = np.array(list(points.values()), dtype=float)
    if values.ndim < 2 or values.shape[1] == 0:
        return tuple(points)
    # An axis is a row, since numpy goes through rows quickest.
    ranks = np.stack([np.unique(axis, return_inverse=True)[1] for axis in values.T])
    order = np.argsort(-ranks.sum(axis=0), kind="stable")
    left = ranks[:, order]
    front: list[int] = []
    while order.size:
        first = left[:, :1]
        better = (left > first).any(axis=0)
        if better[1:].all():  # none goes but the first, so that nothing need be copied
            front.append(int(order[0]))
            order, left = order[1:], left[:, 1:]
        else:
            front += order[(left == first).all(axis=0)].tolist()
            order, left = order[better], left[:, better]
    names = list(points)
    return tuple(names[index] for index in sorted(front))
