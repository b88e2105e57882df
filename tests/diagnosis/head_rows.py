"""Rows of heads as examine makes them, evidence made of them, and a tester that says what it is told to."""

import dataclasses
import math

from fullrank.diagnosis import Evidence
from fullrank.report.verdict import Effect
from fullrank.table import Row

KEYS = 64


def head(layer, index, *, keys=KEYS, stack="decoder", scope="all", source="measured", stderr=0.001, **numbers):
    """One head: a mixer by default. `entropy` is the normalised one."""
    known = {"entropy": 0.6, "selectivity": 1.0, "sink_mass": 0.1, "sink_position": 3.0, "logit_std": 1.5} | numbers
    share = known.pop("entropy")
    values = known | {
        "normalized_entropy": share,
        "entropy": share * math.log(keys),
        "log_context_gauge": known["logit_std"] / math.sqrt(math.log(keys)),
    }
    return [
        Row(
            stack, layer, "attention", "self", name, value, head=index, scope=scope, source=source, n=8,
            stderr=None if name == "sink_position" else stderr,
        )
        for name, value in values.items()
    ]  # fmt: skip


def initial(layer, index, **numbers):
    """The same head at its initialisation: uniform."""
    usual = {"entropy": 0.999, "selectivity": 0.002, "sink_mass": 0.03, "logit_std": 0.2}
    return head(layer, index, source="initialisation", **(usual | numbers))


def grid(special=None, *, layers=4, heads=4, **usual):
    """Rows of all heads of a stack; `special` says what is different of some, by (layer, head)."""
    special = special or {}
    places = [(layer, index) for layer in range(1, layers + 1) for index in range(heads)]
    rows = [row for place in places for row in head(*place, **(usual | special.get(place, {})))]
    return rows + [row for place in places for row in initial(*place)]


def course(metric, values, *, site="stream", part="out", stack="decoder", stderr=None, **more):
    """A number that heads do not have, by layer."""
    return [Row(stack, layer, site, part, metric, value, stderr=stderr, **more) for layer, value in values.items()]


def of_head(metric, values, *, site="attention", part="self", stack="decoder", stderr=None, **more):
    """A number of heads, by (layer, head)."""
    return [
        Row(stack, layer, site, part, metric, value, head=index, stderr=stderr, **more)
        for (layer, index), value in values.items()
    ]


def floor_at(layer, *, stack="decoder"):
    """The row that says a state's tokens differ by rounding alone."""
    return Row(stack, layer, "stream", "out", "residual", 1e-7, note="at the float floor")


def evidence(rows, *, causal=False, layers=4, heads=4, width=64, dtype="float32", weights="trained", **known):
    stack = {"name": "decoder", "blocks": layers, "heads": heads, "width": width, "causal": causal, "path": "blocks.0"}
    about = {"model": "m", "stacks": [stack], "input": {"tokens": 8 * KEYS, "sequences": 8}, "dtype": dtype}
    return Evidence(tuple(rows), about, weights=weights, **known)


@dataclasses.dataclass
class Told:
    """A tester: every intervention changes the loss by `change`, known to ±0.001."""

    change: float | str
    outcome: str = "loss"
    asked: list = dataclasses.field(default_factory=list)

    refused = ""

    def effect(self, intervention):
        self.asked.append(intervention)
        if isinstance(self.change, str):
            return self.change
        return Effect(intervention.words, "loss", self.change, self.change - 0.001, self.change + 0.001, 8, 2.0)
