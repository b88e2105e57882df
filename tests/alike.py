"""Whether two reports say the same, row by row."""

import math


def numbers(of):
    """Value, standard error, count and exactness of every row of a report, or of rows by keys of one's own."""
    rows = of if isinstance(of, dict) else {row.key: row for row in of.rows}
    return {
        key: row if isinstance(row, tuple) else (row.value, row.stderr, row.n, row.exact) for key, row in rows.items()
    }


def differences(one, other, *, tolerance=0.0, absolute=None, but=()):
    """Rows of two reports (or of their `numbers`) that differ by more than a tolerance, relative to at least 1.

    Where `absolute` is given, that is what numbers near 0 may differ by. Rows of metrics in `but` are not looked at.
    """
    one, other = numbers(one), numbers(other)
    absolute = tolerance if absolute is None else absolute
    found = {key: (one.get(key), other.get(key)) for key in one.keys() ^ other.keys()}
    for key in one.keys() & other.keys():
        if key[-1] in but:
            continue
        (*mine, n, exact), (*theirs, their_n, their_exact) = one[key], other[key]
        if (n, exact) != (their_n, their_exact) or not all(
            _close(a, b, tolerance, absolute) for a, b in zip(mine, theirs, strict=True)
        ):
            found[key] = (one[key], other[key])
    return found


def _close(a, b, tolerance, absolute):
    if a is None or b is None:
        return a is b
    return a == b or math.isclose(a, b, rel_tol=tolerance, abs_tol=absolute)
