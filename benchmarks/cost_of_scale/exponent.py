"""How fast a figure grows with a size: the slope where both axes are logarithmic."""

import math
from collections.abc import Sequence

TOLERANCE = 0.2
"""Between an exponent and the one that is expected: overheads and caches bend a curve by so much."""


def upper_half(values: Sequence[float]) -> Sequence[float]:
    """Of the points of a curve those that tell its order: the larger half, three at least where there are three.

    At small sizes a step costs the same whatever it does, and a sum of terms is not yet ruled by its largest.
    """
    return values[-max(3, math.ceil(len(values) / 2)) :]


def exponent(sizes: Sequence[float], figures: Sequence[float]) -> float | None:
    """The least-squares p of figure = c * size^p over the upper half; None for fewer than two points, or a zero."""
    points = list(zip(upper_half(sizes), upper_half(figures), strict=True))
    if len(points) < 2 or min(figure for _, figure in points) <= 0:
        return None
    xs, ys = zip(*((math.log(size), math.log(figure)) for size, figure in points), strict=True)
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    steepness = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return steepness / sum((x - mean_x) ** 2 for x in xs)


def grows_too_fast(found: float | None, expected: float) -> bool:
    """Whether the cost has a higher order than it should. A lower one is overhead that does not grow."""
    return found is not None and found > expected + TOLERANCE
