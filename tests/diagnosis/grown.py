"""Planted rows over contexts: every head a power of the context, with the slope and the interval that it has."""

import math

from fullrank.diagnosis import Evidence
from fullrank.table import Row, Slope

CONTEXTS = (256, 1024, 4096)


def grown(metric, exponents, *, size=0.3, initial=None, stderr=0.01, weights="trained", stack="decoder", floor=(),
          part="self", n=8, loss=None):  # fmt: skip
    """Evidence in which head h of layer l has size · (context/256)^exponents[l][h], over late queries.

    `initial` are the exponents of the same architecture at its initialisation, `floor` the layers after which tokens
    differ by rounding alone. `loss` is the change of the loss by position per doubling with its
    interval, or why it is not known.
    """
    rows = list(_rows(metric, exponents, size, "measured", stack, part))
    rows += _rows(metric, initial or {}, size, "initialisation", stack, part)
    rows += [
        Row(
            stack, layer, "stream", "out", "residual", 1e-8, note="at the float floor: tokens differ by rounding alone."
        )
        for layer in floor
    ]
    slopes = [_slope(metric, stack, layer, part, head, e, stderr, n)
              for layer, heads in exponents.items() for head, e in enumerate(heads)]  # fmt: skip
    if loss is not None:
        rows += [Row(stack, 9, "stream", "out", "token_loss", *((None,) if isinstance(loss, str) else (3.0,)),
                     scope=f"late+context={context}", note=loss if isinstance(loss, str) else "")
                 for context in CONTEXTS]  # fmt: skip
        change, low, high = (None,) * 3 if isinstance(loss, str) else loss
        slopes.append(Slope(stack, 9, "stream", "out", "token_loss", None, "late", CONTEXTS, n, change, None, low, high,
                            None, None, None, None))  # fmt: skip
    about = {"model": "planted", "stacks": [{"name": stack, "causal": True}]}
    return Evidence(tuple(rows), about, tuple(slopes), weights=weights)


def _rows(metric, exponents, size, source, stack, part):
    for layer, heads in exponents.items():
        for head, exponent in enumerate(heads):
            for context in CONTEXTS:
                value = size * (context / CONTEXTS[0]) ** exponent
                for scope in (f"late+context={context}", f"late+no-sink+context={context}"):
                    yield Row(stack, layer, "attention", part, metric, value, head, scope, source=source)
            yield Row(stack, layer, "attention", part, metric, value, head, "late", source=source)


def _slope(metric, stack, layer, part, head, exponent, stderr, n):
    low, high = (exponent + side * 2.36 * stderr for side in (-1, 1)) if n > 1 else (None, None)
    spread = stderr if n > 1 else None
    return Slope(stack, layer, "attention", part, metric, head, "late", CONTEXTS, n, exponent * math.log(2), spread,
                 low, high, exponent, spread, low, high)  # fmt: skip
