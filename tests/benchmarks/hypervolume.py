"""Two objectives, both minimised: the front of a set of plans, and the area that they dominate."""

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]


def front(sizes: Float, gaps: Float) -> NDArray[np.int64]:
    """Indices of the points that no other one dominates, smallest first; of equal points the first one stands.

    sizes, gaps: float64[N].
    """
    order = np.lexsort((gaps, sizes))
    best_before = np.minimum.accumulate(np.append(np.inf, gaps[order]))[:-1]
    return order[gaps[order] < best_before]


def hypervolume(sizes: Float, gaps: Float, *, reference: tuple[float, float], log_sizes: bool = False) -> float:
    """The area that the points dominate up to the reference point (bytes, gap): in percent of gap.

    Bytes count as a share of the reference's, or by the natural logarithm of that share, which gives halving from 8 MB
    to 4 the weight of halving from 2 to 1. A negative gap counts as it is; a point beyond the reference counts nothing.
    """
    share, gaps = np.asarray(sizes, float) / reference[0], np.asarray(gaps, float)
    x = np.log(share) if log_sizes else share
    end = 0.0 if log_sizes else 1.0
    inside = (x < end) & (gaps < reference[1])
    x, gaps = x[inside], gaps[inside]
    kept = front(x, gaps)
    widths = np.diff(np.append(x[kept], end))
    return float((widths * (reference[1] - gaps[kept])).sum())


def _check() -> None:
    """What every benchmark that uses this asserts first: a case by hand, and the area cell by cell on random points."""
    by_hand = np.array([2.0, 4.0, 6.0, 5.0, 12.0, 1.0]), np.array([3.0, 1.0, -1.0, 2.0, -5.0, 7.0])
    # Of ten bytes and a gap of five: two wide by 5 - 3, two by 5 - 1, four by 5 + 1; the last two points lie outside.
    assert list(front(*by_hand)) == [5, 0, 1, 2, 4]
    assert np.isclose(hypervolume(*by_hand, reference=(10, 5)), (2 * 2 + 2 * 4 + 4 * 6) / 10)
    log_area = np.log(4 / 2) * 2 + np.log(6 / 4) * 4 + np.log(10 / 6) * 6
    assert np.isclose(hypervolume(*by_hand, reference=(10, 5), log_sizes=True), log_area)
    assert hypervolume(np.empty(0), np.empty(0), reference=(10, 5)) == 0

    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes, gaps = rng.integers(1, 12, 9).astype(float), rng.integers(-4, 7, 9).astype(float)
        cells = [(i, j) for i in range(10) for j in range(-4, 5)]
        covered = sum(bool(((sizes <= i) & (gaps <= j)).any()) for i, j in cells)
        assert np.isclose(hypervolume(sizes, gaps, reference=(10, 5)) * 10, covered)
