"""A screening as data frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas

    from fullrank.report.screening import Screening

__all__ = ["numbers", "variants"]


def variants(screening: Screening) -> pandas.DataFrame:
    """One line a variant, in order.

    Args:
        screening: any.

    Returns:
        The table; `rank` is NA where nothing was trained.
    """
    import pandas as pd

    lines = []
    for row in screening.rows:
        change = row.change
        lines.append(
            {
                "variant": row.variant,
                "rank": screening.rank(row),
                "kind": row.kind,
                "exactness": row.exactness,
                "parameters": row.parameters,
                "group": row.group,
                "restored": row.share,
                "identity_distance": row.identity_distance,
                "loss": row.loss,
                "change": None if change is None else change.mean,
                "low": None if change is None else change.low,
                "high": None if change is None else change.high,
                "seeds": None if change is None else change.seeds,
                "sequences": None if change is None else change.sequences,
                "trained": row.trained,
                "learning_rate": row.learning_rate,
                "widest_rate": row.widest_rate,
                "extra_parameters": row.extra_parameters,
                "seconds_ratio": row.seconds_ratio,
                "note": row.note,
            }
        )
    integers = dict.fromkeys(("rank", "seeds", "sequences", "extra_parameters"), "Int64")
    numbers = ("restored", "identity_distance", "loss", "change", "low", "high", "learning_rate", "widest_rate")
    types = integers | dict.fromkeys((*numbers, "seconds_ratio"), "Float64") | {"trained": "boolean"}
    return pd.DataFrame(lines).astype(types)


def numbers(screening: Screening) -> pandas.DataFrame:
    """One line for every number of every variant.

    Args:
        screening: any.

    Returns:
        Before, after, reference, null, target and the share of the way; `failure` where it is the failure's own number.
    """
    import pandas as pd

    names = ["variant", "metric", "place", "before", "after", "reference", "null", "target", "share", "failure"]
    lines = [
        [
            row.variant,
            one.metric,
            one.place,
            one.before,
            one.after,
            one.reference,
            one.null,
            one.target,
            one.share,
            one.failure,
        ]
        for row in screening.rows
        for one in row.restored
    ]
    return pd.DataFrame(lines, columns=names).astype(dict.fromkeys(names[3:-1], "Float64"))
