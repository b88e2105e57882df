"""Whether two reports say the same, row by row."""

import math


def numbers(report):
    """Value, standard error, count and exactness of every row, by what it is of."""
    return {row.key: (row.value, row.stderr, row.n, row.exact) for row in report.rows}


def differences(one, other, *, tolerance=0.0, but=()):
    """Rows of two reports (or of their `numbers`) that differ by more than a tolerance, relative to at least 1."""
    one, other = (what if isinstance(what, dict) else numbers(what) for what in (one, other))
    found = {key: (one.get(key), other.get(key)) for key in one.keys() ^ other.keys()}
    for key in one.keys() & other.keys():
        if key[-1] in but:
            continue
        (*mine, n, exact), (*theirs, their_n, their_exact) = one[key], other[key]
        if (n, exact) != (their_n, their_exact) or not all(
            _close(a, b, tolerance) for a, b in zip(mine, theirs, strict=True)
        ):
            found[key] = (one[key], other[key])
    return found


def _close(a, b, tolerance):
    if a is None or b is None:
        return a is b
    return a == b or math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
