"""The Pareto front: what no other beats on every axis."""

from collections.abc import Mapping, Sequence


def pareto_front(points: Mapping[str, Sequence[float]]) -> tuple[str, ...]:
    """The names whose point no other point beats: none is as good on every axis and better on one. More is better.

    Points are looked at in falling lexicographic order, so that whatever beats a point comes before it, and each that
    is still in when its turn comes puts out all that it beats (Kung, Luccio and Preparata, "On Finding the Maxima of a
    Set of Vectors", 1975, has the idea of the order).

    Args:
        points: name -> coordinates, of the same number for each.

    Returns:
        The names in the order of ``points``; equal points are all in or all out.
    """
    import numpy as np

    values = np.array(list(points.values()), dtype=float)
    if values.ndim < 2 or values.shape[1] == 0:
        return tuple(points)
    order = np.lexsort(-values.T[::-1])
    front = []
    while order.size:
        first, rest = values[order[0]], values[order]
        equal = (rest == first).all(axis=1)
        front += [int(index) for index in order[equal]]
        order = order[(rest > first).any(axis=1)]
    names = list(points)
    return tuple(names[index] for index in sorted(front))
